"""Inverter: features of a frozen backbone to samples, whatever draws them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from featinv.checkpoints import load_model
from featinv.extractors import FeatureExtractor, pool
from featinv.hub import push_to_hub
from featinv.utils.devices import device_of
from featinv.utils.errors import InputError, at_least, listing, unknown
from featinv.utils.precision import resolve_precision
from featinv.utils.seeding import Draw, make_generator


class Inverter(nn.Module, ABC):
    """A model that draws images from the features of a frozen backbone.

    Args:
        backbone: The frozen encoder whose features are inverted.
        image_size: Side in pixels of the images that the model draws.
        conditioning: One of `conditionings`: `"spatial"` (the feature map), `"pooled"` (its
            average, copied to every position) or `"none"`.

    Raises:
        InputError: Unknown conditioning.
    """

    conditionings = ("spatial", "pooled")

    def __init__(self, backbone: FeatureExtractor, image_size: int, conditioning: str) -> None:
        super().__init__()
        if conditioning not in self.conditionings:
            kind = f"conditioning of {type(self).__name__}"
            raise unknown(kind, conditioning, self.conditionings)
        self.backbone = backbone
        self.image_size = image_size
        self.conditioning = conditioning
        self.config: dict = {}  # what the model was built from: set by `featinv.checkpoints`
        self.source: Path | None = None  # the file that it was loaded from, if any
        self._frozen_hashes: dict[str, str] | None = None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a model, in eval mode, on the CPU.

        Args:
            path: A run's folder, a `.safetensors` file, a Lightning checkpoint of a run, the name
                of a model that comes with the package, or `hf://owner/name` on the hub.

        Raises:
            InputError: Missing, corrupt, made with another backbone or prior, or a model of another
                class.
        """
        model = load_model(path)
        if not isinstance(model, cls):
            found = type(model).__name__
            raise InputError(
                f"'{path}' holds a {found}, expected a {cls.__name__}: {found}.load or "
                "Inverter.load of featinv.models loads it."
            )
        return model

    def push_to_hub(self, repo_id: str, **options: object) -> str:
        """Push the model to a hub; see `featinv.hub.push_to_hub`."""
        return push_to_hub(self, repo_id, **options)

    @property
    def device(self) -> torch.device:
        """The device of the weights; the CPU, if there are none."""
        return device_of(self)

    def condition(self, features: Tensor) -> Tensor:
        """Return what the networks see of features (B, C, h, w): same shape, perhaps pooled."""
        return pool(features) if self.conditioning == "pooled" else features

    # What a checkpoint holds

    def trained(self) -> nn.ModuleDict:
        """Return the modules that are trained, by their names in the state dict."""
        return nn.ModuleDict()

    def frozen(self) -> dict[str, nn.Module]:
        """Return the frozen modules, by name."""
        return {"backbone": self.backbone}

    def frozen_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the frozen modules' weights, by name."""
        if self._frozen_hashes is None:  # gigabytes at the paper's scale: computed once
            self._frozen_hashes = {name: state_hash(m) for name, m in self.frozen().items()}
        return self._frozen_hashes

    def check_frozen(self, hashes: dict[str, str]) -> None:
        """Raise an `InputError` if a checkpoint was made with other frozen weights."""
        for name, digest in self.frozen_hashes().items():
            if hashes.get(name) != digest:
                part = listing(self.config.get(name, {}).values())
                raise InputError(
                    f"The checkpoint was trained with another {name}: its weights hash to "
                    f"{hashes.get(name, 'nothing')[:12]}, those at hand to {digest[:12]} "
                    f"({part}); use what the checkpoint was trained with."
                )

    def check_trained(self, state: dict[str, Tensor]) -> None:
        """Raise an `InputError` if a state dict does not fit the trained modules."""
        expected = {key: value.shape for key, value in self.trained().state_dict().items()}
        found = {key: value.shape for key, value in state.items()}
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise InputError(
                    f"The checkpoint does not fit the model: '{key}' has shape "
                    f"{tuple(found.get(key, ()))} there, expected {tuple(expected.get(key, ()))}; "
                    "use the backbone, resolution and model that it was trained with."
                )

    # Drawing

    @abstractmethod
    def settings(self, **options: object) -> object:
        """Return the model's drawing settings, overridden by the options.

        Their `describe()` returns them in words, for a caption.

        Raises:
            InputError: An unknown option, or a value out of its range.
        """

    def reconstructs(self, settings: object) -> bool:
        """Return whether what is drawn with these settings depends on the features at all."""
        return True

    def check_reconstructs(self, settings: object) -> None:
        """Raise an `InputError` unless the model `reconstructs`."""
        if not self.reconstructs(settings):
            raise InputError(
                "The model is a prior without a ControlNet, so what it draws does not depend on "
                "the features: expected one trained with conditioning=spatial or pooled, or "
                "sampler.feature_guidance_scale above 0."
            )

    @abstractmethod
    def draw(
        self,
        condition: Tensor,
        layer: str,
        settings: object,
        generators: list[torch.Generator],
    ) -> Tensor:
        """Draw an image for each condition.

        Args:
            condition: Shape (B, C, h, w), as `condition` returns it.
            layer: The backbone's layer that it is of.
            settings: From `settings`.
            generators: One for each image.

        Returns:
            Images, shape (B, 3, image_size, image_size), in [-1, 1].
        """

    @torch.no_grad()
    def invert(
        self,
        features: Tensor,
        num_samples: int = 1,
        *,
        layer: str | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        first_sample: int = 0,
        batch_size: int = 32,
        precision: str = "32-true",
        progress: bool = False,
        **options: object,
    ) -> Tensor:
        """Draw images whose features should be the given ones.

        Args:
            features: Shape (B, C, h, w), from `model.backbone.features(images)`.
            num_samples: Images drawn for each feature map.
            layer: The backbone's layer that they are of; `None`: `model.backbone.layer`.
            seed: Seed of the noise. Sample s of feature map i draws from the generator
                (seed, indices[i], s), so the result does not depend on the batch size.
            indices: The feature maps' own numbers, shape (B,); `None` counts them from 0.
            first_sample: Number of the first sample, to draw samples one call at a time.
            batch_size: Images drawn at once.
            precision: `"32-true"`, `"bf16-mixed"`, or `"auto"` for the faster one on this machine.
            progress: Show a progress bar.
            **options: See `settings`; for a FeatInv, values to replace those of its sampler, e.g.
                `num_steps=20`, `guidance_scale=1.75`, `feature_guidance_scale=10`.

        Returns:
            Reconstructions, shape (B, num_samples, 3, image_size, image_size), in [-1, 1].

        Raises:
            InputError: Features of another shape, or a value out of its range.
        """
        settings = self.settings(**options)
        layer = self._check_features(features, layer)
        at_least("num_samples", num_samples, 1)
        at_least("batch_size", batch_size, 1)
        at_least("seed", seed, 0)
        at_least("first_sample", first_sample, 0)
        indices = range(len(features)) if indices is None else indices
        if len(indices) != len(features):
            raise InputError(
                f"There are {len(indices)} indices for {len(features)} feature maps, expected one "
                "for each."
            )
        shared = getattr(settings, "shared_noise", False)

        def number(i: int) -> int:
            return 0 if shared else int(indices[i])

        samples = range(first_sample, first_sample + num_samples)
        numbers = [(i, s) for i in range(len(features)) for s in samples]
        half = resolve_precision(precision, self.device) == "bf16-mixed"
        reconstructions = []
        for start in trange(
            0, len(numbers), batch_size, unit="batch", desc="invert", disable=not progress
        ):
            rows = numbers[start : start + batch_size]
            generators = [make_generator(seed, Draw.SAMPLING, number(i), s) for i, s in rows]
            condition = self.condition(features[[i for i, _ in rows]].to(self.device))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                images = self.draw(condition, layer, settings, generators)
            reconstructions.append(images.float())
        images = torch.cat(reconstructions)
        return images.view(len(features), num_samples, *images.shape[1:])

    def _check_features(self, features: Tensor, layer: str | None) -> str:
        """Return the layer that features are of, or raise an `InputError`."""
        layer = layer or self.backbone.layer
        if layer not in self.backbone.layers:
            raise unknown("layer of the model", layer, self.backbone.layers)
        expected = self.backbone.feature_shapes[layer]
        shape = features.shape
        if len(shape) != 4 or shape[0] < 1 or shape[1] != expected[0]:
            raise InputError(
                f"The features have shape {tuple(shape)}, expected "
                f"(B, {', '.join(map(str, expected))}) as '{self.backbone.name}' gives at layer "
                f"'{layer}'."
            )
        return layer


def state_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state dict: names, shapes, types and values."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        value = value.detach().cpu().contiguous()
        digest.update(value.view(-1).view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()
