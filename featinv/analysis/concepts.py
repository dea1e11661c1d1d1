"""Concepts: directions in feature space that make up the features of a data set."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
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
from sklearn.preprocessing import normalize
from torch import Tensor

from featinv.analysis.edits import steer
from featinv.backbones import Backbone
from featinv.utils.errors import InputError, unknown
from featinv.utils.tensor_files import read_tensors, save_tensors

SPARSITY = 0.1  # L1 penalty of dictionary learning, for features of unit length


@dataclass(frozen=True)
class Concepts:
    """K concepts; a feature vector is approximately offset + sum_k presence_k direction_k.

    Args:
        directions: Unit vectors, shape (K, C).
        offset: Shape (C,).
        method: How presences are computed: a key of `METHODS`.
        layer: Backbone and layer, e.g. `"tf_efficientnet_lite0 blocks.6"`; empty if unknown.
        lengths: Shape (K,), for k-means only: its centres are offset + length_k direction_k.

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
                "The k-means concepts lack the lengths of their centres: expected concepts that "
                "this version found."
            )

    def __len__(self) -> int:
        return len(self.directions)

    def presence(self, features: Tensor) -> Tensor:
        """Return how much of each concept each position holds.

        Args:
            features: Shape (B, C, h, w).

        Returns:
            Shape (B, K, h, w), in the units of the features.

        Raises:
            InputError: The features have another number of channels.
        """
        batch, channels, height, width = features.shape
        if channels != self.directions.shape[1]:
            raise InputError(
                f"The features have {channels} channels, expected the {self.directions.shape[1]} "
                f"of the layer in which the concepts were found ({self.layer})."
            )
        rows = features.permute(0, 2, 3, 1).reshape(-1, channels).cpu() - self.offset
        atoms = self.directions.double()
        if self.lengths is not None:
            atoms = atoms * self.lengths.double()[:, None]
        presence = METHODS[self.method].encode(rows.double().numpy(), atoms.numpy())
        presence = torch.from_numpy(np.ascontiguousarray(presence)).to(features)
        return presence.view(batch, height, width, len(self)).permute(0, 3, 1, 2)

    def steer(
        self, features: Tensor, concept: int, factor: float, mask: Tensor | None = None
    ) -> Tensor:
        """Attenuate or amplify one concept; see `featinv.analysis.edits.steer`.

        Raises:
            InputError: There is no such concept, or the features have another number of channels.
        """
        if not 0 <= concept < len(self):
            raise InputError(f"There is no concept {concept}: expected 0 to {len(self) - 1}.")
        direction = self.directions[concept].to(features)
        return steer(features, self.presence(features)[:, concept], direction, factor, mask)

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file."""
        tensors = {name: getattr(self, name) for name in ("directions", "offset", "lengths")}
        tensors = {name: value for name, value in tensors.items() if value is not None}
        save_tensors(path, tensors, {"method": self.method, "layer": self.layer})

    @staticmethod
    def load(path: str | Path) -> "Concepts":
        """Read a file that `save` wrote.

        Raises:
            InputError: The file cannot be read, or holds k-means concepts of an older version.
        """
        names = ("directions", "offset", "method")
        return Concepts(**read_tensors(path, "concepts", "Concepts.save", names))


class Method(NamedTuple):
    """A way to find concepts.

    Args:
        make: (number of concepts, seed) -> a scikit-learn estimator whose `components_` or
            `cluster_centers_` are the concepts.
        encode: (centred rows (N, C), directions or cluster centres (K, C)) -> presences (N, K).
        centred: Whether the offset is the mean feature vector, instead of 0.
    """

    make: Callable[[int, int], BaseEstimator]
    encode: Callable[[np.ndarray, np.ndarray], np.ndarray]
    centred: bool = True


def _encode_nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Project on the direction of the nearest centre; the other concepts are absent."""
    nearest = pairwise_distances_argmin(rows, centres)
    presence = rows @ normalize(centres).T
    return np.where(np.arange(len(centres)) == nearest[:, None], presence, 0)


def _encode_nonnegative(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Solve nonnegative least squares, i.e. factorise with fixed components."""
    presence, _, _ = non_negative_factorization(
        rows.clip(min=0), H=directions, update_H=False, tol=1e-6, max_iter=1000
    )
    return presence


def _encode_sparse(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Solve least squares with an L1 penalty on the presences of rows scaled to unit length."""
    rows, length = normalize(rows, return_norm=True)
    presence = sparse_encode(rows, directions, algorithm="lasso_cd", alpha=SPARSITY, max_iter=1000)
    return length[:, None] * presence


METHODS: dict[str, Method] = {
    "pca": Method(
        lambda k, seed: PCA(k, random_state=seed), lambda rows, directions: rows @ directions.T
    ),
    "nmf": Method(
        lambda k, seed: NMF(k, init="nndsvda", random_state=seed, max_iter=400),
        _encode_nonnegative,
        centred=False,
    ),
    "kmeans": Method(lambda k, seed: KMeans(k, n_init=4, random_state=seed), _encode_nearest),
    "dictionary": Method(
        lambda k, seed: MiniBatchDictionaryLearning(
            k, alpha=SPARSITY, max_iter=100, random_state=seed
        ),
        _encode_sparse,
    ),
}


def find_concepts(
    features: Tensor, method: str, num_concepts: int, seed: int = 0, layer: str = ""
) -> Concepts:
    """Find the concepts that make up the features of a data set.

    Args:
        features: Shape (N, C, h, w).
        method: A key of `METHODS`: `"pca"`, `"nmf"` (Lee and Seung 1999; for nonnegative features),
            `"kmeans"` or `"dictionary"` (sparse; Mairal et al. 2009).
        num_concepts: At most min(C, N h w).
        seed: Seed of the estimator.
        layer: Backbone and layer of the features, recorded with the concepts.

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
            f"NMF needs nonnegative features, but the smallest is {rows.min():.3g}: expected a "
            "layer after a ReLU, or pca, kmeans or dictionary."
        )
    chosen = METHODS[method]
    offset = rows.mean(axis=0) if chosen.centred else np.zeros(rows.shape[1])
    rows = rows - offset
    if method == "dictionary":  # as `_encode_sparse` does
        rows = normalize(rows)
    estimator = chosen.make(num_concepts, seed).fit(rows)
    kmeans = method == "kmeans"
    atoms = torch.from_numpy(estimator.cluster_centers_ if kmeans else estimator.components_)
    return Concepts(
        torch.nn.functional.normalize(atoms.float(), dim=1),
        torch.from_numpy(offset).float(),
        method,
        layer,
        atoms.float().norm(dim=1) if kmeans else None,
    )


@torch.no_grad()
def importance(
    backbone: Backbone, concepts: Concepts, features: Tensor, presence: Tensor, classes: Tensor
) -> Tensor:
    """Return the drop in the logit of each image's class when a concept is removed.

    Args:
        backbone: The classifier.
        concepts: K concepts of its last layer.
        features: Shape (N, C, h, w).
        presence: Presences of the concepts in them, shape (N, K, h, w).
        classes: One class per image, int64, shape (N,).

    Returns:
        Shape (N, K), on the CPU; negative where the logit rises.
    """
    device = backbone.device

    def logit(changed: Tensor) -> Tensor:
        logits = [backbone.logits(part.to(device)).cpu() for part in changed.split(64)]
        return torch.cat(logits).gather(1, classes.cpu()[:, None])[:, 0]

    before = logit(features)
    drops = [
        before - logit(steer(features, presence[:, k], direction, 0.0))
        for k, direction in enumerate(concepts.directions.to(features))
    ]
    return torch.stack(drops, dim=1)


def most_important_concept(
    backbone: Backbone, concepts: Concepts, features: Tensor, label: int
) -> int:
    """Return the index of the concept whose removal lowers a class's logit most.

    Args:
        backbone: The classifier.
        concepts: Concepts of its last layer.
        features: Features of images of that class, shape (N, C, h, w), N at least 1.
        label: The class.
    """
    classes = torch.full((len(features),), label)
    drops = importance(backbone, concepts, features, concepts.presence(features), classes)
    return int(drops.mean(dim=0).argmax())
