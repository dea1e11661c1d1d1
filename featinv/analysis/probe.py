"""Probe: a simple classifier on the pooled features of an encoder, mainly of a headless one."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from featinv.backbones import Backbone
from featinv.utils.errors import InputError, unknown
from featinv.utils.pixels import from_uint8
from featinv.utils.tensor_files import read_tensors, save_tensors

METHODS = ("logistic", "neighbours")
NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07  # as in Wu et al. 2018 and Caron et al. 2021


def pooled_features(backbone: Backbone, batches: Iterable[dict]) -> tuple[Tensor, Tensor]:
    """Return pooled features (N, C) of labelled images, on the CPU, and the labels (N,).

    Args:
        backbone: The encoder; its layer `backbone.layer` is used.
        batches: Batches of a data module of `featinv.data`.

    Raises:
        InputError: There is no image, or one without a label.
    """
    features, labels = [], []
    for batch in batches:
        images = from_uint8(batch["image"].to(backbone.device))
        with torch.no_grad():
            features.append(_pool(backbone.features(images)).cpu())
        labels.append(batch["label"])
    if not labels or min(int(part.min()) for part in labels) < 0:
        raise InputError(
            "Every image needs a label to fit a probe, and there must be some: expected "
            "data=imagenette, or another set with labels."
        )
    return torch.cat(features), torch.cat(labels)


@dataclass(frozen=True)
class Probe:
    """A classifier of the pooled features of one layer.

    Args:
        method: One of `METHODS`.
        tensors: What the method learnt from the training set.
        classes: Labels of the training set, int64, shape (K,).
        num_classes: Size of the label space, e.g. 1000 in ImageNet's numbering.
        encoder: Name of the encoder, see `name_encoder`.
        layer: Layer of the encoder.
        accuracy: Accuracy on held-out images; nan if not measured.
    """

    method: str
    tensors: dict[str, Tensor]
    classes: Tensor
    num_classes: int
    encoder: str
    layer: str
    accuracy: float = float("nan")

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits, shape (B, num_classes): -inf for classes outside the training set.

        Args:
            features: Shape (B, C, h, w), or pooled (B, C).

        Raises:
            InputError: The features have another number of channels.
        """
        for name, value in self.tensors.items():
            self.tensors[name] = value.to(features.device)  # moved once
        (matrix,) = (value for value in self.tensors.values() if value.ndim == 2)
        if features.shape[1] != matrix.shape[1]:
            raise InputError(
                f"The features have {features.shape[1]} channels, but the probe takes "
                f"{matrix.shape[1]}: expected those of {self.encoder}, layer {self.layer}."
            )
        rows = _pool(features.float())
        if self.method == "neighbours":
            scores = self._vote(rows)
        else:
            scores = F.linear(rows, self.tensors["weight"], self.tensors["bias"])
        logits = scores.new_full((len(scores), self.num_classes), float("-inf"))
        return logits.index_copy(1, self.classes.to(scores.device), scores)

    def _vote(self, rows: Tensor) -> Tensor:
        """Return log-probabilities (B, K) from the votes of the nearest neighbours.

        A vote has weight exp(cosine / temperature) (Wu et al. 2018, "Unsupervised feature learning
        via non-parametric instance discrimination").
        """
        cosines = F.normalize(rows) @ self.tensors["rows"].T
        nearest, neighbours = cosines.topk(min(NUM_NEIGHBOURS, cosines.shape[1]), dim=1)
        votes = rows.new_zeros(len(rows), len(self.classes))
        weights = (nearest / TEMPERATURE).softmax(dim=1)
        votes.scatter_add_(1, self.tensors["columns"][neighbours], weights)
        return votes.clamp(min=torch.finfo(votes.dtype).tiny).log()

    def attach(self, backbone: Backbone) -> None:
        """Make the probe the classifier of its encoder; see `Backbone.use_probe`.

        Raises:
            InputError: It was fitted to another encoder.
        """
        if self.encoder != (name := name_encoder(backbone)):
            raise InputError(
                f"The probe takes features of {self.encoder}, not of {name}: expected one that "
                "experiments/probe.py fitted to the same encoder."
            )
        backbone.use_probe(self, self.layer, self.num_classes)

    def measure(self, features: Tensor, labels: Tensor) -> float:
        """Return the accuracy on features (N, C, h, w) or (N, C) with labels (N,)."""
        predicted = torch.cat([self(part).argmax(dim=1) for part in features.split(256)])
        return float((predicted == labels).double().mean())

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file."""
        names = ("method", "num_classes", "encoder", "layer", "accuracy")
        about = {name: str(getattr(self, name)) for name in names}
        save_tensors(path, self.tensors | {"classes": self.classes}, about)

    @staticmethod
    def load(path: str | Path) -> "Probe":
        """Read a file that `save` wrote.

        Raises:
            InputError: The file cannot be read.
        """
        names = ("method", "num_classes", "encoder", "layer", "accuracy")
        found = read_tensors(path, "probe", "experiments/probe.py", (*names, "classes"))
        method, num_classes, encoder, layer, accuracy = (found.pop(name) for name in names)
        classes = found.pop("classes")
        return Probe(method, found, classes, int(num_classes), encoder, layer, float(accuracy))


def fit_probe(
    features: Tensor,
    labels: Tensor,
    method: str,
    num_classes: int,
    backbone: Backbone,
    inverse_strength: float = 1.0,
) -> Probe:
    """Fit a probe to labelled features.

    Args:
        features: Shape (N, C, h, w), or pooled (N, C).
        labels: int64, shape (N,).
        method: `"logistic"` or `"neighbours"`.
        num_classes: Size of the label space.
        backbone: The encoder of the features.
        inverse_strength: scikit-learn's C, for `"logistic"`: the smaller, the stronger the penalty.

    Raises:
        InputError: Unknown method, fewer than two classes, or a label outside the label space.
    """
    if method not in METHODS:
        raise unknown("probe", method, METHODS)
    classes, columns = labels.unique(return_inverse=True)
    if len(classes) < 2 or classes[-1] >= num_classes:
        raise InputError(
            f"The images are of {len(classes)} classes, the last one {int(classes[-1])}: expected "
            f"two or more, and labels below num_classes={num_classes}."
        )
    rows, columns = _pool(features.float()).cpu(), columns.cpu()
    if method == "logistic":
        tensors = fit_logistic(rows, columns, inverse_strength)
    else:
        tensors = {"rows": F.normalize(rows), "columns": columns}
    return Probe(
        method, tensors, classes.cpu(), num_classes, name_encoder(backbone), backbone.layer
    )


def name_encoder(backbone: Backbone) -> str:
    """Name the encoder and image size that a probe belongs to."""
    return f"{backbone.name} at {backbone.image_size} px"


def fit_logistic(rows: Tensor, columns: Tensor, inverse_strength: float) -> dict[str, Tensor]:
    """Fit scikit-learn's logistic regression to standardised features.

    Args:
        rows: Pooled features, shape (N, C).
        columns: Indices of their classes, shape (N,).
        inverse_strength: As for `fit_probe`.
    """
    mean, std = rows.mean(0), rows.std(0).clamp(min=1e-6)
    regression = LogisticRegression(C=inverse_strength, max_iter=1000)
    regression.fit(((rows - mean) / std).double().numpy(), columns.numpy())
    weight, bias = regression.coef_, regression.intercept_
    if len(weight) == 1:  # for two classes, scikit-learn has the second one's logit only
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    weight, bias = (torch.from_numpy(value).float() for value in (weight, bias))
    weight = weight / std
    return {"weight": weight, "bias": bias - weight @ mean}


def _pool(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3)) if features.ndim == 4 else features
