"""FeatureExtractor: what models and experiments need of a frozen encoder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from featinv.utils.devices import device_of
from featinv.utils.errors import InputError, unknown


class FeatureExtractor(nn.Module, ABC):
    """A frozen encoder, whatever it is; subclass it for one of your own.

    A subclass sets `name`, `image_size` and `feature_shapes`, and defines `features`; with more
    than one layer, or with classes, also the attributes and methods of these. It needs no `train`:
    it is always in eval mode.

    Attributes:
        name: For tables and error messages.
        image_size: Side in pixels of the view that the encoder sees.
        layers: Names of the layers whose features it gives.
        layer: The default one of `layers`.
        layer_names: All layers that there are, from early to late.
        feature_shapes: (C, h, w) of each of `layers`.
        classifies: Whether there are classes, hence logits: from a head, or from a probe.
        num_classes: How many; 0 if there are none.
    """

    name: str
    image_size: int
    feature_shapes: Mapping[str, tuple[int, int, int]]
    layer: str = "last"
    layers: tuple[str, ...] = ("last",)
    layer_names: Sequence[str] = ("last",)
    classifies = False
    num_classes = 0
    _probe: tuple[Callable[[Tensor], Tensor], str] | None = None

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of `layer`."""
        return self.feature_shapes[self.layer]

    @property
    def device(self) -> torch.device:
        """The device of the weights; the CPU, if there are none."""
        return device_of(self)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: the encoder is frozen for good."""
        return super().train(False)

    def use_layer(self, layer: str) -> None:
        """Make one of `layers` the default of `features`, and so what a model inverts by default.

        Raises:
            InputError: A layer that is not one of `layers`.
        """
        self.layer = self._one_of_layers(layer)

    def use_probe(self, probe: Callable[[Tensor], Tensor], layer: str, num_classes: int) -> None:
        """Classify by a probe of a layer's features instead of the head.

        Args:
            probe: Features (B, C, h, w) -> logits (B, num_classes).
            layer: One of `layers`; of a `Backbone` any of `layer_names`.
            num_classes: Size of its label space.

        Raises:
            InputError: Unknown layer, or one that does not come in one pass with the others.
        """
        self._probe = probe, self._one_of_layers(layer)
        self.classifies, self.num_classes = True, num_classes

    @abstractmethod
    def features(self, images: Tensor, layer: str | None = None) -> Tensor:
        """Return the feature map of a layer.

        Args:
            images: Shape (B, 3, H, W) in [-1, 1], any size.
            layer: One of `layers`; `None` takes `self.layer`.

        Returns:
            Features, shape (B, C, h, w).

        Raises:
            InputError: A layer that is not one of `layers`.
        """

    def all_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of all `layers`, as `features` does."""
        return {layer: self.features(images, layer) for layer in self.layers}

    def features_and_logits(
        self, images: Tensor, layer: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return `features` and `classify` of images; None for logits without classes."""
        features = self.features(images, layer)
        if self._probe is None:
            return features, None
        probe, own = self._probe
        return features, probe(self.features(images, own))

    def classify(self, images: Tensor) -> Tensor:
        """Return the classifier's logits, shape (B, num_classes), of images in [-1, 1].

        Raises:
            InputError: There are no classes.
        """
        self.check_classifies()
        return self.features_and_logits(images)[1]

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits, shape (B, num_classes), of features (B, C, h, w).

        Raises:
            InputError: There are no classes, or the features do not determine the logits.
        """
        self.check_classifies()
        if self._probe is None:
            raise InputError(f"'{self.name}' does not continue from features: expected a probe.")
        return self._probe[0](features)

    def check_classifies(self) -> None:
        """Raise an `InputError` unless there are classes."""
        if not self.classifies:
            raise InputError(
                f"'{self.name}' has no classes, hence no logits: expected a probe of its "
                "features, which experiments/probe.py fits (probe=PATH), or a classifier, for "
                "example backbone=efficientnet_lite0."
            )

    def _one_of_layers(self, layer: str | None) -> str:
        if layer is not None and layer not in self.layers:
            raise unknown(f"layer of backbone '{self.name}'", layer, self.layers)
        return self.layer if layer is None else layer


def pool(features: Tensor) -> Tensor:
    """Replace every position by the average over all positions, shape (B, C, h, w) kept."""
    return features.mean(dim=(2, 3), keepdim=True).expand_as(features)
