"""FeatInv: it wires backbone, codec, UNet, feature encoder and ControlNet together."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from featinv.control import FeatureEncoders, make_controlnet
from featinv.diffusion import Diffusion
from featinv.extractors import FeatureExtractor
from featinv.guidance import Denoiser, classifier_free_guidance
from featinv.losses import PerceptualLoss, alignment_loss
from featinv.metrics import spatial_cosine
from featinv.models.parts import check_guidance, check_parts, reads_prompts
from featinv.models.trainable import TrainableInverter
from featinv.sampling import SamplerConfig, sample_images
from featinv.utils.errors import InputError, unknown
from featinv.utils.pixels import RESIZES, from_uint8, resize
from featinv.utils.seeding import Draw, make_generator, randn


class FeatInv(TrainableInverter):
    """A diffusion model of images given the feature map of a frozen classifier.

    Neukirch, Vielhaben and Strodthoff (2025), arXiv 2505.21032. The ControlNet reads the
    features and steers the UNet; the UNet is either a frozen prior or trained along. A backbone
    with several layers gives one model for all of them: training draws a layer for each image.

    Args:
        backbone: See `TrainableInverter`, also for other arguments that are not here.
        codec: Pixels to latents and back, e.g. `featinv.codecs.PatchPCA`; frozen.
        unet: The denoiser of the latents.
        diffusion: Noise schedule, prediction type and loss.
        sampler: The default sampler of `invert`.
        conditioning: See `Inverter`; `"none"` leaves out the ControlNet: the UNet alone is a prior
            for later runs.
        train_unet: Train the UNet too, instead of keeping it frozen.
        hidden_channels: Width of the feature encoder.
        fold_features: Whether maps larger than the latents' are folded into channels, so that the
            encoder loses nothing of early layers; the paper's maps are smaller.
        cond_drop_prob: Probability of zeroing a sample's features in training, for guidance.
        perceptual: A loss beside the diffusion loss; `None` trains without, as the paper does.
        alignment_weight: Weight of `losses.alignment_loss`, which lets the ControlNet see an image
            in the features long before it would find one by itself; 0 trains without.
        target_resize: How the training image becomes the target: a mode of `pixels.resize`.
        prompts: For a UNet with cross-attention: maps keep (bool, (B,)) to the context
            (B, tokens, dim), e.g. `featinv.interop.stable_diffusion.Prompts`; frozen. A prompt is
            dropped together with the features.

    Raises:
        InputError: A value out of its range, or parts that do not fit each other.
    """

    conditionings = ("spatial", "pooled", "none")

    def __init__(
        self,
        backbone: FeatureExtractor,
        codec: nn.Module,
        unet: UNet2DConditionModel,
        diffusion: Diffusion,
        sampler: SamplerConfig,
        image_size: int,
        conditioning: str = "spatial",
        train_unet: bool = False,
        hidden_channels: int = 512,
        fold_features: bool = False,
        cond_drop_prob: float = 0.15,
        perceptual: PerceptualLoss | None = None,
        alignment_weight: float = 0.0,
        target_resize: str = "bicubic",
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
        if target_resize not in RESIZES:
            raise unknown("model.target_resize", target_resize, RESIZES)
        if conditioning == "none" and not train_unet:
            raise InputError(
                "conditioning=none with model.train_unet=false leaves nothing to train: "
                "expected model.train_unet=true, or conditioning spatial or pooled."
            )
        self.codec, self.unet, self.diffusion = codec, unet, diffusion
        self.prompts = prompts
        self.sampler = sampler
        self.latent_shape = codec.latent_shape(image_size)
        self.train_unet = train_unet
        self.cond_drop_prob = cond_drop_prob
        self.perceptual = perceptual
        self.alignment_weight = alignment_weight
        self.target_resize = target_resize
        check_parts(unet, self.latent_shape, diffusion, sampler, prompts)
        self.feature_encoder: FeatureEncoders | None = None
        self.controlnet = None
        if conditioning != "none":
            self.feature_encoder = FeatureEncoders(
                backbone.feature_shapes,
                out_channels=unet.config.block_out_channels[0],
                latent_size=self.latent_shape[1:],
                hidden_channels=hidden_channels,
                fold_features=fold_features,
            )
            self.controlnet = make_controlnet(unet)
        self.freeze()

    def trained(self) -> nn.ModuleDict:
        """Return the modules that are trained, by their names in the state dict."""
        names = (["unet"] if self.train_unet else []) + (
            ["controlnet", "feature_encoder"] if self.controlnet is not None else []
        )
        return nn.ModuleDict({name: getattr(self, name) for name in names})

    def frozen(self) -> dict[str, nn.Module]:
        """Return the frozen modules, by name."""
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
        layer: str | None = None,
    ) -> Tensor:
        """Run feature encoder, ControlNet and UNet once.

        Args:
            z_t: Noised latents, shape (B, c, h, w).
            timesteps: int64 in [0, num_train_timesteps), shape (B,).
            context: From `context`.
            features: Condition (B, C, h', w'), as `condition` returns it; zeros mean "none".
            layer: The backbone's layer that they are of; `None`: its own.

        Returns:
            The network's prediction (noise, velocity or latents: see `Diffusion`), like z_t.
        """
        encoded = None
        if self.controlnet is not None:
            encoded = self.feature_encoder(features, layer or self.backbone.layer)
        return self.predict(z_t, timesteps, context, encoded)

    def predict(
        self,
        z_t: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        encoded: Tensor | None = None,
    ) -> Tensor:
        """Run ControlNet and UNet once: `denoise` on features that are encoded already."""
        # A UNet that is kept in bfloat16 needs mixed precision, in training and outside of it.
        half = self.unet.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            controls = {}
            if self.controlnet is not None:
                down, mid = self.controlnet(
                    z_t, timesteps, context, controlnet_cond=encoded, return_dict=False
                )
                controls = {
                    "down_block_additional_residuals": down,
                    "mid_block_additional_residual": mid,
                }
            return self.unet(z_t, timesteps, context, **controls, return_dict=False)[0]

    def context(self, keep: Tensor, sampling: bool = False) -> Tensor | None:
        """Return the context, see `Prompts`; None for a UNet without cross-attention.

        Raises:
            InputError: The UNet reads prompts, but the model was made without.
        """
        if self.prompts is not None:
            return self.prompts(keep, sampling)
        if reads_prompts(self.unet):
            raise InputError(
                "The UNet reads a prompt, but the model was made without prompts: expected "
                "prompts=load_prompts(...) of featinv.interop.stable_diffusion."
            )
        return None

    # Training

    def losses(
        self,
        images: Tensor,
        timesteps: Tensor,
        keep: Tensor,
        generators: list[torch.Generator],
        layers: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each image, shape (B,).

        Args:
            images: Shape (B, 3, H, W) in [-1, 1]: backbone view and target are made from it.
            timesteps: int64 in [0, num_train_timesteps), shape (B,).
            keep: bool, shape (B,): False drops the image's features.
            generators: One for each image, for the noise.
            layers: Number of each image's layer in `backbone.layers`, int64, (B,), on the CPU;
                `None`: `backbone.layer` for all.
        """
        with torch.no_grad():
            targets = resize(images, self.image_size, self.target_resize)
            z_0 = self.codec.encode(targets, generators)
        eps = randn(self.latent_shape, generators).to(z_0.device, non_blocking=True)
        z_t = self.diffusion.add_noise(z_0, eps, timesteps)
        encoded = None if self.controlnet is None else self._encode(images, keep, layers)
        prediction = self.predict(z_t, timesteps, self.context(keep), encoded)
        loss = self.diffusion.loss(prediction, z_0, eps, timesteps)
        if encoded is not None and self.alignment_weight > 0:
            alignment = alignment_loss(self.unet, encoded, z_0)
            loss = loss + self.alignment_weight * keep * alignment
        if self.perceptual is not None:
            predicted = self.diffusion.predicted_z_0(prediction.float(), z_t, timesteps)
            alphas_cumprod = self.diffusion.alphas_cumprod[timesteps]
            loss = loss + self.perceptual(
                self.backbone, self.codec.decode(predicted), targets, alphas_cumprod, generators
            )
        return loss

    def _encode(self, images: Tensor, keep: Tensor, layers: Tensor | None) -> Tensor:
        """Return the encoded features of images, each of its own layer, zeroed where not `keep`."""
        if layers is None:
            layers = torch.full((len(images),), self.backbone.layers.index(self.backbone.layer))
        with torch.no_grad():
            features = {
                layer: self.condition(maps) * keep[:, None, None, None].to(maps.dtype)
                for layer, maps in self.backbone.all_features(images).items()
            }
        return self.feature_encoder.of_each(features, layers)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Return the mean loss; all that is random depends on the sample's number only."""
        generators = [make_generator(self.seed, Draw.TRAINING, i) for i in batch["index"].tolist()]
        uniform = torch.stack([torch.rand(2, generator=generator) for generator in generators])
        timesteps = self.diffusion.training_timesteps(uniform[:, 0].double())
        keep = uniform[:, 1] >= self.cond_drop_prob
        timesteps, keep = (t.to(self.device, non_blocking=True) for t in (timesteps, keep))
        layers, number = None, len(self.backbone.layers)
        if number > 1:
            layers = torch.stack([torch.randint(number, (), generator=g) for g in generators])
        return self.losses(from_uint8(batch["image"]), timesteps, keep, generators, layers).mean()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Compute the loss on fixed images, noise, timesteps and layers: the same for every run."""
        index = batch["index"]
        generators = [make_generator(0, Draw.VALIDATION, int(i)) for i in index]
        # Multiples of the golden ratio cover the timesteps evenly, however many images there are.
        timesteps = ((0.5 + index.double() * 0.6180339887498949) % 1).mul(
            self.diffusion.num_train_timesteps
        )
        keep = torch.ones_like(index, dtype=torch.bool)
        layers = index % len(self.backbone.layers)
        timesteps, keep = timesteps.long().to(self.device), keep.to(self.device)
        images = from_uint8(batch["image"])
        self._val_losses.append(self.losses(images, timesteps, keep, generators, layers))

    # Sampling

    def settings(self, **options: object) -> SamplerConfig:
        """Return the model's sampler, but for the values that the options give."""
        sampler = self.sampler.override(**options)
        check_guidance(sampler, self.unet)
        return sampler

    def reconstructs(self, settings: SamplerConfig) -> bool:
        """Return whether there is a ControlNet, or guidance, that sees the features."""
        return self.controlnet is not None or settings.guides_features

    def draw(
        self,
        condition: Tensor,
        layer: str,
        settings: SamplerConfig,
        generators: list[torch.Generator],
    ) -> Tensor:
        """Draw an image for each condition; see `Inverter.draw`."""

        def distance(images: Tensor) -> Tensor:
            seen = self.condition(self.backbone.features(images, layer))
            return 1 - spatial_cosine(seen, condition)

        denoise = self._denoiser(condition, layer, settings)
        return sample_images(
            denoise, distance, settings, self.diffusion, self.codec, self.latent_shape, generators
        )

    def _denoiser(self, condition: Tensor, layer: str, settings: SamplerConfig) -> Denoiser:
        """Return the denoiser given a condition, with classifier-free guidance."""
        keep = torch.ones(len(condition), dtype=torch.bool, device=self.device)
        if self.controlnet is None:
            context = self.context(keep, sampling=True)
            return lambda z_t, timesteps: self.predict(z_t, timesteps, context).float()

        def denoiser(encoded: Tensor, keep: Tensor) -> Denoiser:
            context = self.context(keep, sampling=True)
            return lambda z_t, timesteps: self.predict(z_t, timesteps, context, encoded).float()

        encoded = dropped = self.feature_encoder(condition, layer)
        if settings.guidance == "features":
            dropped = self.feature_encoder(torch.zeros_like(condition), layer)
        return classifier_free_guidance(
            denoiser(encoded, keep),
            denoiser(dropped, ~keep),
            denoiser(torch.cat([encoded, dropped]), torch.cat([keep, ~keep])),
            settings.guidance_scale,
        )
