"""Inverter: what all models share that are trained to invert a frozen backbone."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import lightning as L
import torch
from diffusers.optimization import get_scheduler
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm.auto import trange

from featinv.backbones import Backbone, pool
from featinv.checkpoints import load_model
from featinv.models.checks import check_values
from featinv.utils.distributed import gather
from featinv.utils.errors import InputError, unknown
from featinv.utils.seeding import Draw, make_generator

PRECISIONS = ("32-true", "bf16-mixed")  # of drawing


class Inverter(L.LightningModule, ABC):
    """A model that draws images from the features of a frozen backbone.

    A subclass makes its networks, then calls `freeze`.

    Args:
        backbone: The frozen classifier whose features are inverted.
        image_size: Side in pixels of the images that the model draws.
        conditioning: `"spatial"` (the feature map), `"pooled"` (its average, copied to every
            position) or `"none"`.
        optimizer: Makes the optimiser from the trained parameters.
        lr_schedule: A schedule of `diffusers.optimization.get_scheduler`.
        warmup_steps: Optimiser steps of linear warm-up.
        seed: Seed of all that is random in training.

    Raises:
        InputError: A value out of its range.
    """

    def __init__(
        self,
        backbone: Backbone,
        image_size: int,
        conditioning: str,
        optimizer: Callable[[Iterable[Parameter]], Optimizer],
        lr_schedule: str,
        warmup_steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        check_values(conditioning, lr_schedule, warmup_steps, seed)
        self.backbone = backbone
        self.image_size = image_size
        self.conditioning = conditioning
        self.make_optimizer = optimizer
        self.lr_schedule, self.warmup_steps = lr_schedule, warmup_steps
        self.seed = seed
        # A checkpoint holds the trained weights only, so it cannot be strict about the others;
        # `on_load_checkpoint` checks them instead.
        self.strict_loading = False
        self.config: dict = {}  # what the model was built from: set by `featinv.checkpoints`
        self._frozen_hashes: dict[str, str] | None = None
        self._val_losses: list[Tensor] = []

    @staticmethod
    def load(path: str | Path) -> "Inverter":
        """Load a trained model, in eval mode, on the CPU.

        Args:
            path: A run's folder, a `.safetensors` file or a Lightning checkpoint of a run.

        Raises:
            InputError: Missing, corrupt, or made with another backbone or prior.
        """
        return load_model(path)

    # What is trained and what is frozen

    @abstractmethod
    def trained(self) -> nn.ModuleDict:
        """Return the modules that are trained, by their names in the state dict."""

    @abstractmethod
    def frozen(self) -> dict[str, nn.Module]:
        """Return the modules that are not, by the same names."""

    def freeze(self) -> None:
        """Keep gradients off the frozen modules, and put all into training mode."""
        for module in self.frozen().values():
            module.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Inverter":
        """Set the trained modules to training mode; frozen ones stay in eval mode."""
        super().train(mode)
        for module in self.frozen().values():
            module.eval()
        return self

    def frozen_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the frozen modules' weights, by name."""
        if self._frozen_hashes is None:  # gigabytes at the paper's scale: computed once
            self._frozen_hashes = {name: state_hash(m) for name, m in self.frozen().items()}
        return self._frozen_hashes

    def setup(self, stage: str) -> None:
        """Let DDP send the trained weights from rank to rank, and nothing else.

        Buffers would be sent at every batch, also at those of an uneven validation.
        """
        trained = {name for name, _ in self.trained().named_parameters()}
        everything = [*self.named_parameters(), *self.named_buffers()]
        fixed = [name for name, _ in everything if name not in trained]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, fixed)

    def condition(self, features: Tensor) -> Tensor:
        """Return what the networks see of features (B, C, h, w): same shape, perhaps pooled."""
        return pool(features) if self.conditioning == "pooled" else features

    # Training

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over the images of all ranks, of which some may have had none."""
        losses = torch.cat([torch.empty(0, device=self.device), *self._val_losses])
        self._val_losses = []
        mean = torch.cat(gather(losses)).mean()  # the same on all ranks already
        self.log("val/loss", mean, sync_dist=True, batch_size=1, prog_bar=True)

    def configure_optimizers(self) -> dict:
        """Return the optimiser of the trained parameters and its schedule over optimiser steps.

        Raises:
            InputError: A value that the optimiser refuses.
        """
        try:
            optimizer = self.make_optimizer(self.trained().parameters())
        except (TypeError, ValueError) as error:
            raise InputError(f"The values of model.optimizer do not fit: {error}.") from error
        schedule = get_scheduler(
            self.lr_schedule,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=self.trainer.max_steps,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients, of fused optimisers too.

        Lightning refuses those under mixed precision, since they undo float16's loss scaling after
        the clipping; bfloat16 has no such scaling.

        Raises:
            InputError: A fused optimiser with float16.
        """
        if not gradient_clip_val:
            return
        if self.trainer.precision == "16-mixed" and optimizer.defaults.get("fused"):
            raise InputError(
                "trainer.precision=16-mixed cannot clip the gradients of a fused optimiser: "
                "expected model.optimizer.fused=false, or trainer.precision=bf16-mixed."
            )
        clip = Precision().clip_gradients
        clip(optimizer, gradient_clip_val, gradient_clip_algorithm or GradClipAlgorithmType.NORM)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep the trained weights, the config, and hashes of what is frozen."""
        prefixes = tuple(f"{name}." for name in self.trained())
        checkpoint["state_dict"] = {
            key: value
            for key, value in checkpoint["state_dict"].items()
            if key.startswith(prefixes)
        }
        checkpoint["featinv"] = {"config": self.config, "frozen": self.frozen_hashes()}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Refuse a checkpoint of another architecture or of other frozen weights."""
        self.check_frozen(checkpoint["featinv"]["frozen"])
        self.check_trained(checkpoint["state_dict"])

    def check_frozen(self, hashes: dict[str, str]) -> None:
        """Raise an `InputError` if a checkpoint was made with other frozen weights."""
        for name, digest in self.frozen_hashes().items():
            if hashes.get(name) != digest:
                what = f" '{self.backbone.name}'" if name == "backbone" else ""
                raise InputError(
                    f"The checkpoint was trained with another {name}: its weights hash to "
                    f"{hashes.get(name, 'nothing')[:12]}, those of the {name}{what} at hand to "
                    f"{digest[:12]}; use the configuration that the checkpoint was trained with."
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
        """Return how images are drawn: the model's own way, but for what the options say.

        Its `describe()` says the same in words, for a caption.

        Raises:
            InputError: An unknown option, or a value out of its range.
        """

    def reconstructs(self, settings: object) -> bool:
        """Return whether what is drawn with these settings depends on the features at all."""
        return True

    @abstractmethod
    def draw(
        self, condition: Tensor, settings: object, generators: list[torch.Generator]
    ) -> Tensor:
        """Draw an image for each condition.

        Args:
            condition: Shape (B, C, h, w), as `condition` returns it.
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
            seed: Seed of the noise. Sample s of feature map i draws from the generator
                (seed, indices[i], s), so the result does not depend on the batch size.
            indices: The feature maps' own numbers, shape (B,); `None` counts them from 0.
            first_sample: Number of the first sample, so that those of a call can come one by one.
            batch_size: Images drawn at once.
            precision: `"32-true"`, or `"bf16-mixed"` to draw in bfloat16, which is faster.
            progress: Show a progress bar.
            **options: See `settings`; for a FeatInv, values to replace those of its sampler, e.g.
                `num_steps=20`, `guidance_scale=1.75`, `feature_guidance_scale=0.1`.

        Returns:
            Reconstructions, shape (B, num_samples, 3, image_size, image_size), in [-1, 1].

        Raises:
            InputError: Features of another shape, or a value out of its range.
        """
        settings = self.settings(**options)
        if num_samples < 1 or batch_size < 1:
            raise InputError(
                f"num_samples is {num_samples} and batch_size {batch_size}, expected 1 or more."
            )
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        if seed < 0 or first_sample < 0:
            raise InputError(f"seed is {seed} and first_sample {first_sample}, expected 0 or more.")
        shape = features.shape
        if len(shape) != 4 or shape[0] < 1 or shape[1] != self.backbone.feature_shape[0]:
            raise InputError(
                f"The features have shape {tuple(shape)}, expected "
                f"(B, {', '.join(map(str, self.backbone.feature_shape))}) as "
                f"'{self.backbone.name}' gives at layer '{self.backbone.layer}'."
            )
        indices = range(len(features)) if indices is None else indices
        if len(indices) != len(features):
            raise InputError(
                f"There are {len(indices)} indices for {len(features)} feature maps, expected one "
                "for each."
            )
        samples = range(first_sample, first_sample + num_samples)
        numbers = [(i, s) for i in range(len(features)) for s in samples]
        half = precision == "bf16-mixed"
        reconstructions = []
        starts = trange(
            0, len(numbers), batch_size, unit="batch", desc="invert", disable=not progress
        )
        for start in starts:
            rows = numbers[start : start + batch_size]
            generators = [make_generator(seed, Draw.SAMPLING, int(indices[i]), s) for i, s in rows]
            condition = self.condition(features[[i for i, _ in rows]].to(self.device))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                reconstructions.append(self.draw(condition, settings, generators).float())
        images = torch.cat(reconstructions)
        return images.view(len(features), num_samples, *images.shape[1:])


def state_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state dict: names, shapes, types and values."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        value = value.detach().cpu().contiguous()
        digest.update(value.view(-1).view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()
