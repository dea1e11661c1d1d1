"""Concepts: directions in feature space that make up the features of a data set."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
        atoms: What the method found, shape (K, C); the concepts are their directions. Centres of
            k-means, less the offset, have lengths that count; all others are unit vectors.
        offset: Shape (C,).
        method: How presences are computed: a key of `METHODS`.
        layer: Backbone and layer, e.g. `"tf_efficientnet_lite0 blocks.6"`; empty if unknown.
    """

    atoms: Tensor
    offset: Tensor
    method: str
    layer: str = ""

    @property
    def directions(self) -> Tensor:
        """Unit vectors, shape (K, C)."""
        return F.normalize(self.atoms, dim=1)

    def __len__(self) -> int:
        return len(self.atoms)

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
        if channels != self.atoms.shape[1]:
            raise InputError(
                f"The features have {channels} channels, expected the {self.atoms.shape[1]} of "
                f"the layer in which the concepts were found ({self.layer})."
            )
        rows = features.permute(0, 2, 3, 1).reshape(-1, channels).cpu() - self.offset
        presence = METHODS[self.method].encode(rows.double().numpy(), self.atoms.double().numpy())
        presence = torch.from_numpy(np.ascontiguousarray(presence)).to(features)
        return presence.view(batch, height, width, len(self)).permute(0, 3, 1, 2)

    def steer(
        self, features: Tensor, factors: Mapping[int, float], mask: Tensor | None = None
    ) -> Tensor:
        """Attenuate or amplify concepts; see `featinv.analysis.edits.steer`.

        Args:
            features: Shape (B, C, h, w).
            factors: Concept -> factor. All presences are those in `features`, so the order of the
                concepts does not matter.
            mask: Where to edit; `None`: everywhere.

        Raises:
            InputError: There is no such concept, or the features have another number of channels.
        """
        if absent := sorted(set(factors) - set(range(len(self)))):
            raise InputError(f"There is no concept {absent[0]}: expected 0 to {len(self) - 1}.")
        presence, directions = self.presence(features), self.directions.to(features)
        for concept, factor in factors.items():
            features = steer(features, presence[:, concept], directions[concept], factor, mask)
        return features

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file."""
        tensors = {"atoms": self.atoms, "offset": self.offset}
        save_tensors(path, tensors, {"method": self.method, "layer": self.layer})

    @staticmethod
    def load(path: str | Path) -> "Concepts":
        """Read a file that `save` wrote.

        Raises:
            InputError: The file cannot be read.
        """
        what = (path, "concepts", "Concepts.save")
        found = read_tensors(*what, ("offset", "method"))
        if "atoms" not in found:  # of an earlier version
            lengths = ("lengths",) if found["method"] == "kmeans" else ()
            found = read_tensors(*what, ("directions", *lengths))
            found["atoms"] = found.pop("directions") * found.pop("lengths", torch.ones(1))[:, None]
        return Concepts(**found)


class Method(NamedTuple):
    """A way to find concepts.

    Args:
        make: (centred rows (N, C), number of concepts K, seed) -> atoms (K, C).
        encode: (centred rows (N, C), atoms (K, C)) -> presences (N, K).
        centred: Whether the offset is the mean feature vector, instead of 0.
    """

    make: Callable[[np.ndarray, int, int], np.ndarray]
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


def _find_dictionary(rows: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Learn a dictionary of rows scaled to unit length, as `_encode_sparse` scales them."""
    learner = MiniBatchDictionaryLearning(number, alpha=SPARSITY, max_iter=100, random_state=seed)
    return normalize(learner.fit(normalize(rows)).components_)


METHODS: dict[str, Method] = {
    "pca": Method(
        lambda rows, k, seed: normalize(PCA(k, random_state=seed).fit(rows).components_),
        lambda rows, directions: rows @ directions.T,
    ),
    "nmf": Method(
        lambda rows, k, seed: normalize(
            NMF(k, init="nndsvda", random_state=seed, max_iter=400).fit(rows).components_
        ),
        _encode_nonnegative,
        centred=False,
    ),
    "kmeans": Method(
        lambda rows, k, seed: KMeans(k, n_init=4, random_state=seed).fit(rows).cluster_centers_,
        _encode_nearest,
    ),
    "dictionary": Method(_find_dictionary, _encode_sparse),
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
    atoms = torch.from_numpy(chosen.make(rows - offset, num_concepts, seed)).float()
    return Concepts(atoms, torch.from_numpy(offset).float(), method, layer)


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
