"""FeatInv, the LightningModule: it wires backbone, codec, UNet and ControlNet together."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from featinv.backbones import Backbone
from featinv.control import make_controlnet
from featinv.diffusion import Diffusion
from featinv.guidance import (
    Denoiser,
    classifier_free_guidance,
    epsilon_scaling,
    forward_guidance,
    into_pixel_range,
    polish,
)
from featinv.losses import PerceptualLoss
from featinv.metrics import spatial_cosine
from featinv.models.base import Inverter
from featinv.models.checks import check_guidance, check_prompts, reads_prompts
from featinv.sampling import SamplerConfig, sample
from featinv.transforms import transform_all
from featinv.utils.errors import InputError
from featinv.utils.pixels import from_uint8, resize
from featinv.utils.seeding import Draw, make_generator, randn


class FeatInv(Inverter):
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
        perceptual: Adds a loss between what a frozen network sees of the predicted and of the true
            image; `None` trains by the diffusion loss alone, as the paper does.
        alignment_weight: Weight of a loss that teaches the feature encoder to give what the UNet's
            first convolution gives of the clean latents, so that the ControlNet starts to see an
            image in the features long before it would find one by itself; 0 trains without.
        optimizer: Makes the optimiser from the trained parameters.
        lr_schedule: A schedule of `diffusers.optimization.get_scheduler`.
        warmup_steps: Optimiser steps of linear warm-up.
        seed: Seed of all noise, timesteps and dropouts in training.
        prompts: For a UNet with cross-attention: maps keep (bool, (B,)) to the context
            (B, tokens, dim), e.g. `featinv.interop.stable_diffusion.Prompts`; frozen. A prompt is
            dropped together with the features.

    Raises:
        InputError: A value out of its range, or parts that do not fit each other.
    """

    def __init__(
        self,
        backbone: Backbone,
        codec: nn.Module,
        unet: UNet2DConditionModel,
        diffusion: Diffusion,
        sampler: SamplerConfig,
        image_size: int,
        conditioning: str = "spatial",
        train_unet: bool = False,
        hidden_channels: int = 512,
        cond_drop_prob: float = 0.15,
        perceptual: PerceptualLoss | None = None,
        alignment_weight: float = 0.0,
        optimizer: Callable[[Iterable[Parameter]], Optimizer] = torch.optim.AdamW,
        lr_schedule: str = "constant_with_warmup",
        warmup_steps: int = 0,
        seed: int = 0,
        prompts: nn.Module | None = None,
    ) -> None:
        super().__init__(
            backbone, image_size, conditioning, optimizer, lr_schedule, warmup_steps, seed
        )
        if not 0 <= cond_drop_prob <= 1:
            raise InputError(f"model.cond_drop_prob is {cond_drop_prob}, expected 0 to 1.")
        if alignment_weight < 0:
            raise InputError(f"model.alignment_weight is {alignment_weight}, expected 0 or more.")
        if conditioning == "none" and not train_unet:
            raise InputError(
                "conditioning=none with model.train_unet=false leaves nothing to train: "
                "expected model.train_unet=true, or conditioning spatial or pooled."
            )
        self.codec, self.unet, self.diffusion = codec, unet, diffusion
        self.prompts = prompts
        sampler.make_scheduler(diffusion)  # refuses now, not after hours, what does not fit
        self.sampler = sampler
        self.latent_shape = codec.latent_shape(image_size)
        if unet.config.in_channels != self.latent_shape[0]:
            raise InputError(
                f"The UNet takes latents of {unet.config.in_channels} channels, but the codec's "
                f"have {self.latent_shape[0]}: expected the codec that the UNet was trained with."
            )
        check_prompts(unet, prompts)
        check_guidance(unet, sampler)
        self.train_unet = train_unet
        self.cond_drop_prob = cond_drop_prob
        self.perceptual = perceptual
        self.alignment_weight = alignment_weight
        self.controlnet = None
        if conditioning != "none":
            self.controlnet = make_controlnet(
                unet, backbone.feature_shape[0], self.latent_shape[1:], hidden_channels
            )
        self.freeze()

    def trained(self) -> nn.ModuleDict:
        """Return the modules that are trained, by their names in the state dict."""
        names = (["unet"] if self.train_unet else []) + (["controlnet"] if self.controlnet else [])
        return nn.ModuleDict({name: getattr(self, name) for name in names})

    def frozen(self) -> dict[str, nn.Module]:
        """Return the modules that are not, by the same names."""
        frozen = {"backbone": self.backbone, "codec": self.codec}
        if self.prompts is not None:
            frozen["prompts"] = self.prompts
        return frozen if self.train_unet else {**frozen, "unet": self.unet}

    # Denoising

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
                "prompts=load_prompts(...) of featinv.interop.stable_diffusion."
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
            targets = resize(images, self.image_size)
            z_0 = self.codec.encode(targets, generators)
        eps = randn(self.latent_shape, generators).to(z_0.device)
        z_t = self.diffusion.add_noise(z_0, eps, timesteps)
        prediction = self.denoise(z_t, timesteps, self.context(keep), features)
        loss = self.diffusion.loss(prediction, z_0, eps, timesteps)
        if features is not None and self.alignment_weight > 0:
            loss = loss + self.alignment_weight * self._alignment(features, z_0, keep)
        if self.perceptual is not None:
            z_0 = self.diffusion.predicted_z_0(prediction.float(), z_t, timesteps)
            alphas_cumprod = self.diffusion.alphas_cumprod[timesteps]
            loss = loss + self.perceptual(
                self.backbone, self.codec.decode(z_0), targets, alphas_cumprod, generators
            )
        return loss

    def _alignment(self, features: Tensor, z_0: Tensor, keep: Tensor) -> Tensor:
        """Return how far the encoded features are from the first activations of the latents."""
        with self._autocast():
            with torch.no_grad():
                target = self.unet.conv_in(z_0).float()
            error = self.controlnet.controlnet_cond_embedding(features).float() - target
        return keep * error.square().mean(dim=(1, 2, 3))

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

    # Sampling

    def settings(self, **options: object) -> SamplerConfig:
        """Return the model's sampler, but for the values that the options give."""
        sampler = self.sampler.override(**options)
        check_guidance(self.unet, sampler)
        return sampler

    def reconstructs(self, settings: SamplerConfig) -> bool:
        """Return whether there is a ControlNet, or guidance, that sees the features."""
        return self.controlnet is not None or settings.guides_features

    def draw(
        self, condition: Tensor, settings: SamplerConfig, generators: list[torch.Generator]
    ) -> Tensor:
        """Draw an image for each condition; see `Inverter.draw`."""
        dropped = condition if settings.guidance == "text" else torch.zeros_like(condition)
        keep = torch.ones(len(condition), dtype=torch.bool, device=self.device)
        denoise = classifier_free_guidance(
            self._denoiser(condition, keep),
            self._denoiser(dropped, ~keep),
            self._denoiser(torch.cat([condition, dropped]), torch.cat([keep, ~keep])),
            settings.guidance_scale if self.controlnet is not None else 1,
        )
        if settings.epsilon_scaling > 0:
            denoise = epsilon_scaling(denoise, self.diffusion, settings.epsilon_scaling)

        def distance(z_0: Tensor, noise_level: Tensor) -> Tensor:
            images = self.codec.decode(z_0)
            images = transform_all(settings.transforms, images, noise_level, generators)
            return 1 - spatial_cosine(self.condition(self.backbone.features(images)), condition)

        project = into_pixel_range(self.codec) if settings.guides_features else None
        if settings.feature_guidance_scale > 0:
            denoise = forward_guidance(
                denoise, distance, self.diffusion, settings.feature_guidance_scale, project
            )
        noise = randn(self.latent_shape, generators).to(self.device)
        scheduler = settings.make_scheduler(self.diffusion)
        latents = sample(denoise, noise, scheduler, settings.eta, generators)
        latents = polish(
            latents, distance, settings.polish_steps, settings.polish_step_size, project
        )
        return self.codec.decode(latents).clamp(-1, 1)

    def _denoiser(self, condition: Tensor, keep: Tensor) -> Denoiser:
        context = self.context(keep)
        return lambda z_t, timesteps: self.denoise(z_t, timesteps, context, condition)
