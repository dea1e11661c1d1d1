"""Probe: a simple classifier on the pooled features of an encoder, in particular of a headless one.

It reads classes from features whose encoder predicts none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from featinv.analysis.tensor_files import read_tensors
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
    """A classifier of the pooled features of one layer.

    Args:
        method: A key of `METHODS`.
        tensors: What the method keeps of the training set.
        classes: Labels that it has seen, int64, shape (K,).
        num_classes: Size of the label space, e.g. 1000 in ImageNet's numbering.
        encoder: Of which encoder, see `name_encoder`.
        layer: Of which of its layers.
        accuracy: On held-out images; nan before it was measured.
    """

    method: str
    tensors: dict[str, Tensor]
    classes: Tensor
    num_classes: int
    encoder: str
    layer: str
    accuracy: float = float("nan")

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits, shape (B, num_classes), -inf for classes that were never seen.

        Args:
            features: Of the probe's layer, (B, C, h, w) or pooled already, (B, C).

        Raises:
            InputError: Features of another number of channels.
        """
        for name, value in self.tensors.items():
            self.tensors[name] = value.to(features.device)  # and there they stay
        (matrix,) = (value for value in self.tensors.values() if value.ndim == 2)
        if features.shape[1] != matrix.shape[1]:
            raise InputError(
                f"The features have {features.shape[1]} channels, but the probe reads "
                f"{matrix.shape[1]}: expected those of {self.encoder}, layer {self.layer}."
            )
        rows = _pool(features.float())
        seen = self._vote(rows) if self.method == "neighbours" else self._project(rows)
        logits = seen.new_full((len(seen), self.num_classes), float("-inf"))
        return logits.index_copy(1, self.classes.to(seen.device), seen)

    def _project(self, rows: Tensor) -> Tensor:
        """Return the logits of a logistic regression, shape (B, K)."""
        return rows @ self.tensors["weight"].T + self.tensors["bias"]

    def _vote(self, rows: Tensor) -> Tensor:
        """Return log probabilities by the votes of the nearest neighbours, shape (B, K).

        A vote weighs exp(cosine / temperature) (Wu et al. 2018, "Unsupervised feature learning via
        non-parametric instance discrimination").
        """
        cosines = F.normalize(rows) @ self.tensors["rows"].T
        nearest, who = cosines.topk(min(NUM_NEIGHBOURS, cosines.shape[1]), dim=1)
        votes = rows.new_zeros(len(rows), len(self.classes))
        weights = (nearest / TEMPERATURE).softmax(dim=1)
        votes.scatter_add_(1, self.tensors["columns"][who], weights)
        return votes.clamp(min=torch.finfo(votes.dtype).tiny).log()

    def attach(self, backbone: Backbone) -> None:
        """Make the probe the classifier of its encoder, see `Backbone.use_probe`.

        Raises:
            InputError: It was fitted to another encoder.
        """
        if self.encoder != (found := name_encoder(backbone)):
            raise InputError(
                f"The probe reads features of {self.encoder}, not of {found}: expected one that "
                "experiments/probe.py fitted to the same encoder."
            )
        backbone.use_probe(self, self.layer, self.num_classes)

    def measure(self, features: Tensor, labels: Tensor) -> float:
        """Return the accuracy on labelled features."""
        predicted = torch.cat([self(part).argmax(dim=1) for part in features.split(256)])
        return float((predicted == labels).double().mean())

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file."""
        names = ("method", "num_classes", "encoder", "layer", "accuracy")
        tensors = {key: value.cpu().contiguous() for key, value in self.tensors.items()}
        about = {name: str(getattr(self, name)) for name in names}
        save_file(tensors | {"classes": self.classes}, str(path), about)

    @staticmethod
    def load(path: str | Path) -> "Probe":
        """Read what `save` wrote.

        Raises:
            InputError: The file is missing or something else.
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
    **options: Any,
) -> Probe:
    """Fit a probe.

    Args:
        features: Of the backbone's layer, (N, C, h, w), or pooled already, (N, C).
        labels: int64, shape (N,).
        method: `"logistic"` or `"neighbours"`.
        num_classes: Size of the label space.
        backbone: Whose features they are.
        **options: Of `fit_logistic`.

    Raises:
        InputError: Unknown method, fewer than two classes, or a label beyond the label space.
    """
    if method not in METHODS:
        raise unknown("probe", method, METHODS)
    classes, columns = labels.unique(return_inverse=True)
    if len(classes) < 2 or classes[-1] >= num_classes:
        raise InputError(
            f"The images are of {len(classes)} classes, the last one {int(classes[-1])}: expected "
            f"two or more, and labels below num_classes={num_classes}."
        )
    tensors = METHODS[method](_pool(features.float()).cpu(), columns.cpu(), **options)
    return Probe(
        method, tensors, classes.cpu(), num_classes, name_encoder(backbone), backbone.layer
    )


def name_encoder(backbone: Backbone) -> str:
    """Return what a probe is bound to, in words."""
    return f"{backbone.name} at {backbone.image_size} px"


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


def keep_neighbours(rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """Keep the training set, features of unit length; arguments as for `fit_logistic`."""
    return {"rows": F.normalize(rows), "columns": columns}


# Name -> (features (N, C), numbers of classes (N,)) to what is kept, one matrix of C columns
METHODS = {"logistic": fit_logistic, "neighbours": keep_neighbours}


def _pool(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3)) if features.ndim == 4 else features
