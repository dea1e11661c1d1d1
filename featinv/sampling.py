"""Sampling: a denoiser and a scheduler turn noise into latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from featinv.diffusion import Diffusion
from featinv.guidance import Denoiser, epsilon_scaling, forward_guidance, into_pixel_range, polish
from featinv.transforms import PixelNoise, ShiftAndZoom, Transform, transform_all
from featinv.utils.errors import InputError, at_least, unknown
from featinv.utils.seeding import randn

# DDIM is spaced as in Stable Diffusion's own sampler: 50 steps visit t = 981, ..., 21, 1.
SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict]] = {
    "ddim": (
        DDIMScheduler,
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "dpm_solver": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
    "unipc": (UniPCMultistepScheduler, {"timestep_spacing": "trailing"}),
}
GUIDANCES = ("features", "text")


@dataclass(frozen=True)
class SamplerConfig:
    """How features become images: the values of the config group `sampler`.

    Args:
        scheduler: `"ddim"` (Song et al. 2021), `"dpm_solver"` (DPM-Solver++ 2M, Lu et al. 2022)
            or `"unipc"` (Zhao et al. 2023).
        num_steps: Denoising steps.
        guidance_scale: Classifier-free guidance (Ho and Salimans 2022); 1 switches it off.
        guidance: What classifier-free guidance leads away from: `"features"` drops features and
            prompt, as in training; `"text"` drops the prompt only, as the original code does (a
            pair that its training never saw).
        eta: Share of fresh noise in a DDIM step, in [0, 1]; 0 is deterministic.
        epsilon_scaling: Assumed error of the predicted noise (`guidance.epsilon_scaling`); 0
            disables the correction.
        feature_guidance_scale: Length of a step towards the features in each denoising step, at
            full noise (`guidance.forward_guidance`); 0 is off.
        polish_steps: Steps towards the features on the final image (`guidance.polish`).
        polish_step_size: Root mean square of the first of them, in the latents' units.
        transform_noise: Standard deviation, at full noise, of the pixel noise through which
            guidance sees the image (`transforms.PixelNoise`); it falls to a tenth of that.
        transform_shift: Largest shift in pixels of that view (`transforms.ShiftAndZoom`).
        transform_zoom: Largest relative zoom of that view.
        transform_views: Random views whose mean distance guides: each costs a pass through the
            backbone, and makes a sample of the expectation over transformations less noisy.
        shared_noise: Draw sample s of all images from the same noise, as the original code does,
            which seeds anew before each image.

    Raises:
        InputError: A value out of its range.
    """

    scheduler: str = "dpm_solver"
    num_steps: int = 20
    guidance_scale: float = 1.75
    guidance: str = "features"
    eta: float = 0.0
    epsilon_scaling: float = 0.0
    feature_guidance_scale: float = 0.0
    polish_steps: int = 0
    polish_step_size: float = 0.015
    transform_noise: float = 0.0
    transform_shift: float = 0.0
    transform_zoom: float = 0.0
    transform_views: int = 1
    shared_noise: bool = False

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise unknown("scheduler", self.scheduler, SCHEDULERS)
        if self.guidance not in GUIDANCES:
            raise unknown("sampler.guidance", self.guidance, GUIDANCES)
        if not 1 <= self.num_steps <= 1000:
            raise InputError(f"sampler.num_steps is {self.num_steps}, expected 1 to 1000.")
        if not 0 <= self.eta <= 1 or (self.eta and self.scheduler != "ddim"):
            raise InputError(
                f"sampler.eta is {self.eta} with scheduler {self.scheduler}, "
                "expected 0, or up to 1 with ddim."
            )
        at_least("sampler.transform_views", self.transform_views, 1)
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not 0 <= value < float("inf"):
                raise InputError(f"sampler.{field.name} is {value}, expected 0 or more.")

    def override(self, **values: object) -> "SamplerConfig":
        """Return a copy with the values that are not None replaced.

        Raises:
            InputError: Unknown name, or a value out of its range.
        """
        names = [field.name for field in fields(self)]
        for name in values:
            if name not in names:
                raise unknown("value of the sampler", name, names)
        return replace(self, **{key: value for key, value in values.items() if value is not None})

    @property
    def guides_features(self) -> bool:
        """Whether the gradient of the feature distance is used at all."""
        return self.feature_guidance_scale > 0 or self.polish_steps > 0

    @property
    def transforms(self) -> list[Transform]:
        """The random transformations through which guidance sees the image."""
        transforms: list[Transform] = []
        if self.transform_shift or self.transform_zoom:
            transforms.append(ShiftAndZoom(self.transform_shift, self.transform_zoom))
        if self.transform_noise:
            transforms.append(PixelNoise(self.transform_noise, 0.1 * self.transform_noise))
        return transforms

    def describe(self) -> str:
        """Return the values that matter, for a caption."""
        views = f" in {self.transform_views} views" if self.transform_views > 1 else ""
        texts = [
            (f"{self.scheduler}, {self.num_steps} steps, guidance {self.guidance_scale:g}", True),
            (f"eta {self.eta:g}", self.eta),
            (f"epsilon scaling {self.epsilon_scaling:g}", self.epsilon_scaling),
            (f"feature guidance {self.feature_guidance_scale:g}", self.feature_guidance_scale),
            (
                f"polished in {self.polish_steps} steps of {self.polish_step_size:g}",
                self.polish_steps,
            ),
            (
                f"seen through noise {self.transform_noise:g}, shift {self.transform_shift:g} px, "
                f"zoom {self.transform_zoom:g}{views}",
                self.guides_features and self.transforms,
            ),
        ]
        return ", ".join(text for text, shown in texts if shown)

    def make_scheduler(self, diffusion: Diffusion) -> SchedulerMixin:
        """Return the diffusers scheduler for a diffusion, with its timesteps set.

        Raises:
            InputError: The scheduler cannot lay that many steps over the diffusion's timesteps:
                diffusers' rounding makes some numbers start far too late or step out of range.
        """
        scheduler_class, options = SCHEDULERS[self.scheduler]
        scheduler = scheduler_class(**diffusion.scheduler_config, **options)
        num_timesteps = diffusion.num_train_timesteps
        scheduler.set_timesteps(self.num_steps)
        first, last = scheduler.timesteps[0].item(), scheduler.timesteps[-1].item()
        covered = first + num_timesteps / self.num_steps >= 0.9 * num_timesteps
        if covered and first < num_timesteps and last >= 0:
            return scheduler
        raise InputError(
            f"sampler.num_steps is {self.num_steps}, which {self.scheduler} cannot space evenly "
            f"over {num_timesteps} timesteps; expected for example {-(-num_timesteps // 20)}."
        )


def sample(
    denoise: Denoiser,
    noise: Tensor,
    scheduler: SchedulerMixin,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    first: int = 0,
) -> Tensor:
    """Draw latents by stepping through a scheduler's timesteps.

    Args:
        denoise: The (guided) denoiser.
        noise: Standard normal noise z_T, shape (B, c, h, w), or z_t of the first timestep.
        scheduler: A diffusers scheduler whose timesteps are set.
        eta: Share of fresh noise in a DDIM step.
        generators: One generator for each sample, for that fresh noise.
        first: Which of the timesteps comes first.

    Returns:
        Latents z_0, same shape.
    """
    options = {"eta": eta, "generator": list(generators)} if eta else {}
    z_t = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps[first:]:
        timesteps = torch.full((len(z_t),), int(timestep), device=z_t.device)
        # Schedulers cast the latents to the prediction's type: float32, whatever autocast does.
        prediction = denoise(scheduler.scale_model_input(z_t, timestep), timesteps).float()
        z_t = scheduler.step(prediction, timestep, z_t, **options).prev_sample
    return z_t


def sample_images(
    denoise: Denoiser,
    distance: Callable[[Tensor], Tensor],
    config: SamplerConfig,
    diffusion: Diffusion,
    codec: nn.Module,
    latent_shape: Sequence[int],
    generators: Sequence[torch.Generator],
    start: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Draw images by a denoiser, guided down a distance if the sampler says so.

    Args:
        denoise: The denoiser, e.g. with classifier-free guidance.
        distance: Maps images (B, 3, H, W) in about [-1, 1] to a distance (B,), differentiable.
        config: The sampler.
        diffusion: Whose prediction the denoiser makes.
        codec: Latents to images and back.
        latent_shape: Of one image, (c, h, w).
        generators: One for each image, for all that is random.
        start: Latents (B, c, h, w) to redraw: sampling starts from these, noised (SDEdit, Meng et
            al. 2022, arXiv 2108.01073). `None` starts from noise alone.
        strength: Share of the steps that are taken then, above 0.

    Returns:
        Images, shape (B, 3, H, W), in [-1, 1].
    """

    def latent_distance(z_0: Tensor, noise_level: Tensor) -> Tensor:
        images, transforms = codec.decode(z_0), config.transforms
        views = config.transform_views if transforms else 1
        distances = [
            distance(transform_all(transforms, images, noise_level, generators))
            for _ in range(views)
        ]
        return torch.stack(distances).mean(dim=0)

    if config.epsilon_scaling > 0:
        denoise = epsilon_scaling(denoise, diffusion, config.epsilon_scaling)
    project = into_pixel_range(codec) if config.guides_features else None
    if config.feature_guidance_scale > 0:
        denoise = forward_guidance(
            denoise, latent_distance, diffusion, config.feature_guidance_scale, project
        )
    noise = randn(latent_shape, generators).to(diffusion.alphas_cumprod.device)
    scheduler = config.make_scheduler(diffusion)
    first = 0
    if start is not None:
        first = len(scheduler.timesteps) - max(1, round(strength * len(scheduler.timesteps)))
        timesteps = scheduler.timesteps[first].to(start.device).expand(len(start))
        noise = diffusion.add_noise(start, noise, timesteps)
    latents = sample(denoise, noise, scheduler, config.eta, generators, first)
    latents = polish(
        latents, latent_distance, config.polish_steps, config.polish_step_size, project
    )
    return codec.decode(latents).clamp(-1, 1)
