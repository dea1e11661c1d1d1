"""FeatInv, the LightningModule: it wires backbone, codec, UNet and ControlNet together."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import lightning as L
import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm.auto import trange

from featinv.backbones import Backbone
from featinv.checks import check_guidance, check_prompts, check_values, reads_prompts
from featinv.consistency import Consistency
from featinv.control import make_controlnet
from featinv.diffusion import Diffusion
from featinv.edits import pool
from featinv.errors import InputError
from featinv.metrics import spatial_cosine
from featinv.pixels import from_uint8, resize
from featinv.ranks import gather
from featinv.sampling import (
    Denoiser,
    Sampler,
    classifier_free_guidance,
    feature_guidance,
    sample,
)
from featinv.seeding import Draw, make_generator, randn


class FeatInv(L.LightningModule):
    """A diffusion model of images given the feature map of a frozen classifier.

    Neukirch, Vielhaben and Strodthoff (2025), arXiv 2505.21032. The ControlNet reads the
    features and steers the UNet; the UNet is either a frozen prior or trained along.

    Args:
        backbone: The frozen classifier whose features are inverted.
        codec: Pixels to latents and back, e.g. `featinv.codecs.PatchPCA`; frozen.
        unet: The denoiser of the latents.
        diffusion: Noise schedule, prediction type and loss.
        sampler: The values that `invert` takes where the call says nothing else.
        image_size: Side in pixels of the images that the model draws.
        conditioning: `"spatial"` (the feature map), `"pooled"` (its average, copied to every
            position) or `"none"` (no ControlNet: the UNet alone, a prior for later runs).
        train_unet: Train the UNet too, instead of keeping it frozen.
        hidden_channels: Width of the feature encoder.
        cond_drop_prob: Probability of zeroing a sample's features in training, for guidance.
        consistency: Adds a loss between the features asked for and those of the predicted image;
            `None` trains by the diffusion loss alone, as the paper does.
        optimizer: Makes the optimiser from the trained parameters.
        lr_schedule: A schedule of `diffusers.optimization.get_scheduler`.
        warmup_steps: Optimiser steps of linear warm-up.
        seed: Seed of all noise, timesteps and dropouts in training.
        prompts: For a UNet with cross-attention: maps keep (bool, (B,)) to the context
            (B, tokens, dim), e.g. `featinv.stable_diffusion.Prompts`; frozen. A prompt is dropped
            together with the features.

    Raises:
        InputError: A value out of its range, or parts that do not fit each other.
    """

    def __init__(
        self,
        backbone: Backbone,
        codec: nn.Module,
        unet: UNet2DConditionModel,
        diffusion: Diffusion,
        sampler: Sampler,
        image_size: int,
        conditioning: str = "spatial",
        train_unet: bool = False,
        hidden_channels: int = 512,
        cond_drop_prob: float = 0.15,
        consistency: Consistency | None = None,
        optimizer: Callable[[Iterable[Parameter]], Optimizer] = torch.optim.AdamW,
        lr_schedule: str = "constant_with_warmup",
        warmup_steps: int = 0,
        seed: int = 0,
        prompts: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_values(conditioning, cond_drop_prob, lr_schedule, warmup_steps, seed)
        if conditioning == "none" and not train_unet:
            raise InputError(
                "conditioning=none with model.train_unet=false leaves nothing to train: "
                "expected model.train_unet=true, or conditioning spatial or pooled."
            )
        self.backbone, self.codec, self.unet, self.diffusion = backbone, codec, unet, diffusion
        self.prompts = prompts
        sampler.make_scheduler(diffusion)  # refuses now, not after hours, what does not fit
        self.sampler = sampler
        self.image_size = image_size
        self.latent_shape = codec.latent_shape(image_size)
        if unet.config.in_channels != self.latent_shape[0]:
            raise InputError(
                f"The UNet takes latents of {unet.config.in_channels} channels, but the codec's "
                f"have {self.latent_shape[0]}: expected the codec that the UNet was trained with."
            )
        check_prompts(unet, prompts)
        check_guidance(unet, sampler)
        self.conditioning = conditioning
        self.train_unet = train_unet
        self.cond_drop_prob = cond_drop_prob
        self.consistency = consistency
        self.make_optimizer = optimizer
        self.lr_schedule, self.warmup_steps = lr_schedule, warmup_steps
        self.seed = seed
        self.controlnet = None
        if conditioning != "none":
            self.controlnet = make_controlnet(
                unet, backbone.feature_shape[0], self.latent_shape[1:], hidden_channels
            )
        for module in self._frozen().values():
            module.requires_grad_(False)
        self.train()
        # A checkpoint holds the trained weights only, so it cannot be strict about the others;
        # `on_load_checkpoint` checks them instead.
        self.strict_loading = False
        self.config: dict = {}  # what the model was built from: set by `featinv.checkpoints`
        self._frozen_hashes: dict[str, str] | None = None
        self._val_losses: list[Tensor] = []

    @staticmethod
    def load(path: str | Path) -> "FeatInv":
        """Load a trained model, in eval mode, on the CPU.

        Args:
            path: A run's folder, a `.safetensors` file or a Lightning checkpoint of a run.

        Raises:
            InputError: Missing, corrupt, or made with another backbone or prior.
        """
        from featinv.checkpoints import load_model  # it stands on this module

        return load_model(path)

    # What is trained and what is frozen

    def trained(self) -> nn.ModuleDict:
        """Return the modules that are trained, by their names in the state dict."""
        names = (["unet"] if self.train_unet else []) + (["controlnet"] if self.controlnet else [])
        return nn.ModuleDict({name: getattr(self, name) for name in names})

    def _frozen(self) -> dict[str, nn.Module]:
        frozen = {"backbone": self.backbone, "codec": self.codec}
        if self.prompts is not None:
            frozen["prompts"] = self.prompts
        return frozen if self.train_unet else {**frozen, "unet": self.unet}

    def train(self, mode: bool = True) -> "FeatInv":
        """Set the trained modules to training mode; frozen ones stay in eval mode."""
        super().train(mode)
        for module in self._frozen().values():
            module.eval()
        return self

    def frozen_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the frozen modules' weights, by name."""
        if self._frozen_hashes is None:  # gigabytes at the paper's scale: computed once
            self._frozen_hashes = {name: state_hash(m) for name, m in self._frozen().items()}
        return self._frozen_hashes

    def setup(self, stage: str) -> None:
        """Let DDP send the trained weights from rank to rank, and nothing else.

        Buffers would be sent at every batch, also at those of an uneven validation.
        """
        trained = {name for name, _ in self.trained().named_parameters()}
        everything = [*self.named_parameters(), *self.named_buffers()]
        fixed = [name for name, _ in everything if name not in trained]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, fixed)

    # Denoising

    def condition(self, features: Tensor) -> Tensor:
        """Return what the ControlNet sees of features (B, C, h, w): same shape, perhaps pooled."""
        return pool(features) if self.conditioning == "pooled" else features

    def denoise(
        self,
        z_t: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Run ControlNet and UNet once.

        Args:
            z_t: Noised latents, shape (B, c, h, w).
            timesteps: int64 in [0, num_train_timesteps), shape (B,).
            context: Prompt embeddings (B, tokens, dim), for a UNet with cross-attention.
            features: Condition (B, C, h', w'), as `condition` returns it; zeros mean "none".

        Returns:
            The network's prediction (noise, velocity or latents: see `Diffusion`), like z_t.
        """
        with self._autocast():
            controls = {}
            if self.controlnet is not None:
                down, mid = self.controlnet(
                    z_t, timesteps, context, controlnet_cond=features, return_dict=False
                )
                controls = {
                    "down_block_additional_residuals": down,
                    "mid_block_additional_residual": mid,
                }
            return self.unet(z_t, timesteps, context, **controls, return_dict=False)[0]

    def _autocast(self) -> AbstractContextManager:
        """Mixed precision for a UNet that is kept in bfloat16, in training and outside of it."""
        if self.unet.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def context(self, keep: Tensor) -> Tensor | None:
        """Return the prompt's embeddings (B, tokens, dim), the empty prompt's where not `keep`.

        Args:
            keep: bool, shape (B,).

        Returns:
            The context for `denoise`; None for a UNet without cross-attention.

        Raises:
            InputError: The UNet reads prompts, but the model was made without.
        """
        if self.prompts is not None:
            return self.prompts(keep)
        if reads_prompts(self.unet):
            raise InputError(
                "The UNet reads a prompt, but the model was made without prompts: expected "
                "prompts=load_prompts(...) of featinv.stable_diffusion."
            )
        return None

    # Training

    def losses(
        self, images: Tensor, timesteps: Tensor, keep: Tensor, generators: list[torch.Generator]
    ) -> Tensor:
        """Return the diffusion loss of each image, shape (B,).

        Args:
            images: Shape (B, 3, H, W) in [-1, 1]: backbone view and target are made from it.
            timesteps: int64 in [0, num_train_timesteps), shape (B,).
            keep: bool, shape (B,): False drops the image's features.
            generators: One for each image, for the noise.
        """
        with torch.no_grad():
            features = None
            if self.controlnet is not None:
                features = self.condition(self.backbone.features(images))
                features = features * keep[:, None, None, None].to(features.dtype)
            z_0 = self.codec.encode(resize(images, self.image_size), generators)
        eps = randn(self.latent_shape, generators).to(z_0.device)
        z_t = self.diffusion.add_noise(z_0, eps, timesteps)
        prediction = self.denoise(z_t, timesteps, self.context(keep), features)
        loss = self.diffusion.loss(prediction, z_0, eps, timesteps)
        if self.consistency is None or features is None:
            return loss
        z_0 = self.diffusion.predicted_z_0(prediction.float(), z_t, timesteps)
        return loss + self.consistency(self._seen, z_0, features, timesteps, keep)

    def _seen(self, latents: Tensor) -> Tensor:
        """Return the condition that the image of some latents would give."""
        return self.condition(self.backbone.features(self.codec.decode(latents)))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Return the mean loss; timestep, dropout and noise depend on the sample's number only."""
        generators = [make_generator(self.seed, Draw.TRAINING, int(i)) for i in batch["index"]]
        uniform = torch.stack([torch.rand(2, generator=generator) for generator in generators])
        timesteps = self.diffusion.training_timesteps(uniform[:, 0].double()).to(self.device)
        keep = (uniform[:, 1] >= self.cond_drop_prob).to(self.device)
        loss = self.losses(from_uint8(batch["image"]), timesteps, keep, generators).mean()
        size = len(timesteps)
        self.log("train/loss", loss, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Compute the loss on fixed images, noise and timesteps: the same for every run."""
        index = batch["index"]
        generators = [make_generator(0, Draw.VALIDATION, int(i)) for i in index]
        # Multiples of the golden ratio cover the timesteps evenly, however many images there are.
        timesteps = ((0.5 + index.double() * 0.6180339887498949) % 1).mul(
            self.diffusion.num_train_timesteps
        )
        keep = torch.ones_like(index, dtype=torch.bool)
        losses = self.losses(from_uint8(batch["image"]), timesteps.long(), keep, generators)
        self._val_losses.append(losses)

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

    # Sampling

    @torch.no_grad()
    def invert(
        self,
        features: Tensor,
        num_samples: int = 1,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int = 32,
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
            batch_size: Images drawn at once.
            progress: Show a progress bar.
            **options: Values that replace those of the model's own `Sampler`, e.g.
                `num_steps=20`, `guidance_scale=1.75`, `feature_guidance_scale=0.1`.

        Returns:
            Reconstructions, shape (B, num_samples, 3, image_size, image_size), in [-1, 1].

        Raises:
            InputError: Features of another shape, or a value out of its range.
        """
        sampler = self.sampler.override(**options)
        check_guidance(self.unet, sampler)
        if num_samples < 1 or batch_size < 1:
            raise InputError(
                f"num_samples is {num_samples} and batch_size {batch_size}, expected 1 or more."
            )
        if seed < 0:
            raise InputError(f"seed is {seed}, expected 0 or more.")
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
        numbers = [(i, s) for i in range(len(features)) for s in range(num_samples)]
        reconstructions = []
        starts = trange(
            0, len(numbers), batch_size, unit="batch", desc="invert", disable=not progress
        )
        for start in starts:
            rows = numbers[start : start + batch_size]
            generators = [make_generator(seed, Draw.SAMPLING, int(indices[i]), s) for i, s in rows]
            condition = self.condition(features[[i for i, _ in rows]].to(self.device))
            reconstructions.append(self._draw(condition, sampler, generators))
        images = torch.cat(reconstructions)
        return images.view(len(features), num_samples, *images.shape[1:])

    def _draw(
        self, condition: Tensor, sampler: Sampler, generators: list[torch.Generator]
    ) -> Tensor:
        dropped = condition if sampler.guidance == "text" else torch.zeros_like(condition)
        keep = torch.ones(len(condition), dtype=torch.bool, device=self.device)
        denoise = classifier_free_guidance(
            self._denoiser(condition, keep),
            self._denoiser(dropped, ~keep),
            self._denoiser(torch.cat([condition, dropped]), torch.cat([keep, ~keep])),
            sampler.guidance_scale if self.controlnet is not None else 1,
        )
        noise = randn(self.latent_shape, generators).to(self.device)
        scheduler = sampler.make_scheduler(self.diffusion)
        if sampler.feature_guidance_scale > 0:
            denoise = self._guide(denoise, condition, sampler, scheduler.timesteps.tolist())
        latents = sample(denoise, noise, scheduler, sampler.eta, generators)
        return self.codec.decode(latents).clamp(-1, 1)

    def _guide(
        self, denoise: Denoiser, condition: Tensor, sampler: Sampler, timesteps: list[int]
    ) -> Denoiser:
        guided = timesteps[-(sampler.feature_guidance_steps or len(timesteps)) :]
        return feature_guidance(
            denoise,
            lambda z_0: 1 - spatial_cosine(self._seen(z_0), condition),
            self.diffusion,
            sampler.feature_guidance_scale,
            sampler.feature_guidance_iterations,
            first_timestep=guided[0],
        )

    def _denoiser(self, condition: Tensor, keep: Tensor) -> Denoiser:
        context = self.context(keep)
        return lambda z_t, timesteps: self.denoise(z_t, timesteps, context, condition)


def state_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state dict: names, shapes, types and values."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        value = value.detach().cpu().contiguous()
        digest.update(value.view(-1).view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()
