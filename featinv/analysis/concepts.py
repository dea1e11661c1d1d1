"""Concepts: directions in feature space that make up the features of a data set."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.decomposition import (
    NMF,
    PCA,
    MiniBatchDictionaryLearning,
    non_negative_factorization,
    sparse_encode,
)
from sklearn.metrics import pairwise_distances_argmin
from torch import Tensor

from featinv.analysis.edits import steer
from featinv.analysis.tensor_files import read_tensors
from featinv.backbones import Backbone
from featinv.utils.errors import InputError, unknown

SPARSITY = 0.1  # of dictionaries: weight of the absolute presences, per unit of feature length


@dataclass(frozen=True)
class Concepts:
    """A set of concepts: a feature vector is about offset + sum over k of presence_k direction_k.

    Args:
        directions: Shape (K, C), of length 1.
        offset: Shape (C,).
        method: How presences are read: a key of `METHODS`.
        layer: Of which backbone and layer, e.g. `"tf_efficientnet_lite0 blocks.6"`.
        lengths: For k-means, whose centres are offset + length_k direction_k: shape (K,).

    Raises:
        InputError: k-means without lengths.
    """

    directions: Tensor
    offset: Tensor
    method: str
    layer: str = ""
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if self.method == "kmeans" and self.lengths is None:
            raise InputError(
                "Concepts of k-means are read by the distance to its centres, whose lengths are "
                "missing: expected concepts that this version found."
            )

    def __len__(self) -> int:
        return len(self.directions)

    def presence(self, features: Tensor) -> Tensor:
        """Return how much of each concept is at each position.

        Args:
            features: Shape (B, C, h, w).

        Returns:
            In the features' units, shape (B, K, h, w).

        Raises:
            InputError: Features of another number of channels.
        """
        batch, channels, height, width = features.shape
        if channels != self.directions.shape[1]:
            raise InputError(
                f"The features have {channels} channels, expected {self.directions.shape[1]}: "
                f"those of the layer that the concepts were found in ({self.layer})."
            )
        rows = features.permute(0, 2, 3, 1).reshape(-1, channels).cpu() - self.offset
        found = self.directions.double()
        if self.lengths is not None:
            found = found * self.lengths.double()[:, None]
        presence = METHODS[self.method].read(rows.double().numpy(), found.numpy())
        presence = torch.from_numpy(np.ascontiguousarray(presence)).to(features)
        return presence.view(batch, height, width, len(self)).permute(0, 3, 1, 2)

    def steer(
        self, features: Tensor, concept: int, factor: float, mask: Tensor | None = None
    ) -> Tensor:
        """Attenuate or amplify one concept; see `featinv.analysis.edits.steer`.

        Raises:
            InputError: There is no such concept, or features of another number of channels.
        """
        if not 0 <= concept < len(self):
            raise InputError(f"There is no concept {concept}: expected 0 to {len(self) - 1}.")
        direction = self.directions[concept].to(features)
        return steer(features, self.presence(features)[:, concept], direction, factor, mask)

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file."""
        tensors = {name: getattr(self, name) for name in ("directions", "offset", "lengths")}
        tensors = {name: value.contiguous() for name, value in tensors.items() if value is not None}
        save_file(tensors, str(path), {"method": self.method, "layer": self.layer})

    @staticmethod
    def load(path: str | Path) -> "Concepts":
        """Read what `save` wrote.

        Raises:
            InputError: The file is missing, something else, or of an older version's k-means.
        """
        names = ("directions", "offset", "method")
        return Concepts(**read_tensors(path, "concepts", "Concepts.save", names))


class Method(NamedTuple):
    """A way to find concepts.

    Args:
        make: (number of concepts, seed) -> an estimator of scikit-learn's kind, which has its
            concepts as `components_` or `cluster_centers_` after `fit`.
        read: (rows (N, C) without the offset, directions (K, C), or centres) -> presences (N, K).
        centred: Whether the mean feature is the offset, instead of 0.
    """

    make: Callable[[int, int], BaseEstimator]
    read: Callable[[np.ndarray, np.ndarray], np.ndarray]
    centred: bool = True


def _project(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Project on all directions."""
    return rows @ directions.T


def _nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Project on the direction of the nearest centre, as k-means assigns it; others are absent."""
    nearest = pairwise_distances_argmin(rows, centres)
    directions = centres / np.linalg.norm(centres, axis=1, keepdims=True).clip(min=1e-12)
    return np.where(np.arange(len(centres)) == nearest[:, None], rows @ directions.T, 0)


def _nonnegative(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Nonnegative least squares: the factorisation with its components fixed."""
    presence, _, _ = non_negative_factorization(
        rows.clip(min=0), H=directions, update_H=False, tol=1e-6, max_iter=1000
    )
    return presence


def _sparse(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Least squares with a penalty on absolute presences, relative to the length of the rows."""
    length = np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
    return length * sparse_encode(
        rows / length, directions, algorithm="lasso_cd", alpha=SPARSITY, max_iter=1000
    )


METHODS: dict[str, Method] = {
    "pca": Method(lambda k, seed: PCA(k, random_state=seed), _project),
    "nmf": Method(
        lambda k, seed: NMF(k, init="nndsvda", random_state=seed, max_iter=400),
        _nonnegative,
        centred=False,
    ),
    "kmeans": Method(lambda k, seed: KMeans(k, n_init=4, random_state=seed), _nearest),
    "dictionary": Method(
        lambda k, seed: MiniBatchDictionaryLearning(
            k, alpha=SPARSITY, max_iter=100, random_state=seed
        ),
        _sparse,
    ),
}


def find_concepts(
    features: Tensor, method: str, num_concepts: int, seed: int = 0, layer: str = ""
) -> Concepts:
    """Find the concepts of a data set's features.

    Another method is an entry in `METHODS`.

    Args:
        features: Shape (N, C, h, w).
        method: `"pca"`, `"nmf"` (Lee and Seung 1999; for features that are nowhere negative),
            `"kmeans"` or `"dictionary"` (sparse; Mairal et al. 2009).
        num_concepts: How many, at most C and the number of positions.
        seed: Seed of the search.
        layer: For the record.

    Raises:
        InputError: Unknown method, too many concepts, or negative features for NMF.
    """
    if method not in METHODS:
        raise unknown("method for concepts", method, METHODS)
    rows = features.permute(0, 2, 3, 1).flatten(0, 2).double().cpu().numpy()  # (N h w, C)
    if not 1 <= num_concepts <= min(rows.shape):
        raise InputError(
            f"The number of concepts is {num_concepts}, expected 1 to {min(rows.shape)} for "
            f"{rows.shape[0]} positions of {rows.shape[1]} channels."
        )
    if method == "nmf" and rows.min() < 0:
        raise InputError(
            f"NMF takes no negative features, but the least is {rows.min():.3g}: expected a layer "
            "after a ReLU, or pca, kmeans or dictionary."
        )
    chosen = METHODS[method]
    offset = rows.mean(axis=0) if chosen.centred else np.zeros(rows.shape[1])
    rows = rows - offset
    if method == "dictionary":  # its penalty is relative to the length, as in reading
        rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
    estimator = chosen.make(num_concepts, seed).fit(rows)
    found = getattr(estimator, "components_", None)
    found = estimator.cluster_centers_ if found is None else found
    found = torch.from_numpy(np.asarray(found, dtype=np.float32))
    lengths = found.norm(dim=1) if method == "kmeans" else None
    directions = torch.nn.functional.normalize(found, dim=1)
    return Concepts(directions, torch.from_numpy(offset).float(), method, layer, lengths)


@torch.no_grad()
def importance(
    backbone: Backbone, concepts: Concepts, features: Tensor, presence: Tensor, classes: Tensor
) -> Tensor:
    """Return how far the logit of an image's class falls when a concept is removed.

    Args:
        backbone: Whose head continues from the features.
        concepts: K of them.
        features: Of the last layer, shape (N, C, h, w).
        presence: Of the concepts in them, shape (N, K, h, w).
        classes: Which logit of each image, int64, shape (N,).

    Returns:
        In units of the logits, negative where it rises; on the CPU, shape (N, K).
    """
    device = backbone.mean.device

    def logit(changed: Tensor) -> Tensor:
        logits = [backbone.logits(part.to(device)).cpu() for part in changed.split(64)]
        return torch.cat(logits).gather(1, classes.cpu()[:, None])[:, 0]

    before = logit(features)
    falls = [
        before - logit(steer(features, presence[:, k], concepts.directions[k].to(features), 0.0))
        for k in range(len(concepts))
    ]
    return torch.stack(falls, dim=1)


def needed_concept(backbone: Backbone, concepts: Concepts, features: Tensor, label: int) -> int:
    """Return the number of the concept whose removal costs a class most.

    Args:
        backbone: The classifier.
        concepts: Of its last layer.
        features: Of images that it takes for that class, shape (N, C, h, w), N at least 1.
        label: The class.
    """
    classes = torch.full((len(features),), label)
    falls = importance(backbone, concepts, features, concepts.presence(features), classes)
    return int(falls.mean(dim=0).argmax())
