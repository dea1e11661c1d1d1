"""Probe: a simple classifier on the pooled features of an encoder, in particular of a headless one.

It tells what classes the features hold, where the encoder itself has none to tell.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from featinv.backbones import Backbone
from featinv.utils.errors import InputError, unknown
from featinv.utils.pixels import from_uint8

NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07  # as Wu et al. 2018 and Caron et al. 2021 vote


def pooled_features(backbone: Backbone, batches: Iterable[dict]) -> tuple[Tensor, Tensor]:
    """Return the pooled features (N, C) of labelled images, on the CPU, and their labels (N,).

    Args:
        backbone: Of its layer `backbone.layer`.
        batches: Of a data module of `featinv.data`.

    Raises:
        InputError: There is no image, or one without a label.
    """
    features, labels = [], []
    for batch in batches:
        images = from_uint8(batch["image"].to(backbone.mean.device))
        with torch.no_grad():
            features.append(_pool(backbone.features(images)).cpu())
        labels.append(batch["label"])
    if not labels or min(int(part.min()) for part in labels) < 0:
        raise InputError(
            "A probe is fitted to the classes of images, but there are none, or some without a "
            "label: expected data=imagenette, or another set with labels."
        )
    return torch.cat(features), torch.cat(labels)


@dataclass(frozen=True)
class Probe:
    """A classifier of pooled features.

    Args:
        method: A key of `METHODS`.
        tensors: What the method keeps of the training set.
        classes: Labels of the logits' columns, int64, shape (K,).
        layer: Of which encoder and layer, see `layer_of`.
        accuracy: On held-out images; nan before it was measured.
    """

    method: str
    tensors: dict[str, Tensor]
    classes: Tensor
    layer: str
    accuracy: float = float("nan")

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits, shape (B, K).

        Args:
            features: Of the probe's layer, (B, C, h, w) or pooled already, (B, C).

        Raises:
            InputError: Features of another number of channels.
        """
        (matrix,) = (value for value in self.tensors.values() if value.ndim == 2)
        expected = matrix.shape[1]
        if features.shape[1] != expected:
            raise InputError(
                f"The features have {features.shape[1]} channels, but the probe reads {expected}: "
                f"expected those of {self.layer}."
            )
        tensors = {name: value.to(features.device) for name, value in self.tensors.items()}
        return METHODS[self.method].logits(tensors, _pool(features.float()), len(self.classes))

    def check(self, backbone: Backbone) -> None:
        """Raise an `InputError` if the probe is of another encoder or layer."""
        if self.layer != layer_of(backbone):
            raise InputError(
                f"The probe reads features of {self.layer}, not of {layer_of(backbone)}: expected "
                "one that experiments/probe.py fitted to the same encoder, layer and image size."
            )

    def measure(self, features: Tensor, labels: Tensor) -> float:
        """Return the share of features whose class the probe tells as it is labelled."""
        told = torch.cat([self(part).argmax(dim=1) for part in features.split(256)])
        return float((self.classes[told] == labels).double().mean())

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file."""
        about = {"method": self.method, "layer": self.layer, "accuracy": str(self.accuracy)}
        tensors = {key: value.contiguous() for key, value in self.tensors.items()}
        save_file(tensors | {"classes": self.classes}, str(path), about)

    @staticmethod
    def load(path: str | Path) -> "Probe":
        """Read what `save` wrote.

        Raises:
            InputError: The file is missing or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                about = file.metadata()
            classes, accuracy = tensors.pop("classes"), float(about["accuracy"])
            return Probe(about["method"], tensors, classes, about["layer"], accuracy)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise InputError(
                f"The probe '{path}' cannot be read ({type(error).__name__}: {error}); expected a "
                "file that experiments/probe.py wrote."
            ) from error


def fit_probe(
    features: Tensor, labels: Tensor, method: str, layer: str = "", **options: Any
) -> Probe:
    """Fit a probe.

    Args:
        features: (N, C, h, w), or pooled already, (N, C).
        labels: int64, shape (N,).
        method: `"logistic"` or `"neighbours"`.
        layer: For the record, see `layer_of`.
        **options: Of `fit_logistic` or `fit_neighbours`.

    Raises:
        InputError: Unknown method, or fewer than two classes.
    """
    if method not in METHODS:
        raise unknown("probe", method, METHODS)
    classes, columns = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"The images are of {len(classes)} class: expected two or more.")
    tensors = METHODS[method].fit(_pool(features.float()).cpu(), columns.cpu(), **options)
    return Probe(method, tensors, classes.cpu(), layer)


def layer_of(backbone: Backbone) -> str:
    """Return what a probe is bound to, in words."""
    return f"{backbone.name}, layer {backbone.layer}, at {backbone.image_size} px"


def fit_logistic(rows: Tensor, columns: Tensor, inverse_strength: float = 1.0) -> dict[str, Tensor]:
    """Fit a logistic regression to standardised features, by scikit-learn.

    Args:
        rows: Features, shape (N, C).
        columns: Numbers of their classes, shape (N,).
        inverse_strength: scikit-learn's C: the smaller, the stronger the penalty.
    """
    mean, std = rows.mean(0), rows.std(0).clamp(min=1e-6)
    regression = LogisticRegression(C=inverse_strength, max_iter=1000)
    regression.fit(((rows - mean) / std).double().numpy(), columns.numpy())
    weight, bias = regression.coef_, regression.intercept_
    if len(weight) == 1:  # of two classes, scikit-learn gives the logit of the second one
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    weight, bias = (torch.from_numpy(value).float() for value in (weight, bias))
    weight = weight / std
    return {"weight": weight, "bias": bias - weight @ mean}


def logistic_logits(tensors: dict[str, Tensor], rows: Tensor, num_classes: int) -> Tensor:
    """Return the logits of a logistic regression, shape (B, num_classes)."""
    return rows @ tensors["weight"].T + tensors["bias"]


def fit_neighbours(rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """Keep the training set, features of unit length; arguments as for `fit_logistic`."""
    return {"rows": F.normalize(rows), "columns": columns}


def neighbour_logits(tensors: dict[str, Tensor], rows: Tensor, num_classes: int) -> Tensor:
    """Return log probabilities by the votes of the nearest neighbours, (B, num_classes).

    A vote weighs exp(cosine / temperature) (Wu et al. 2018, "Unsupervised feature learning via
    non-parametric instance discrimination").
    """
    cosines = F.normalize(rows) @ tensors["rows"].T
    nearest, who = cosines.topk(min(NUM_NEIGHBOURS, cosines.shape[1]), dim=1)
    votes = rows.new_zeros(len(rows), num_classes)
    weights = (nearest / TEMPERATURE).softmax(dim=1)
    votes.scatter_add_(1, tensors["columns"][who], weights)
    return votes.clamp(min=torch.finfo(votes.dtype).tiny).log()


@dataclass(frozen=True)
class Method:
    """A kind of probe.

    Args:
        fit: (features (N, C), numbers of classes (N,)) -> what is kept, one matrix of C columns.
        logits: (what is kept, features (B, C), number of classes) -> logits.
    """

    fit: Callable[..., dict[str, Tensor]]
    logits: Callable[[dict[str, Tensor], Tensor, int], Tensor]


METHODS = {
    "logistic": Method(fit_logistic, logistic_logits),
    "neighbours": Method(fit_neighbours, neighbour_logits),
}


def _pool(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3)) if features.ndim == 4 else features
