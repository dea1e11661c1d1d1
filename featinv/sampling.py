"""Sampling: a denoiser and a scheduler turn noise into latents; guidance wraps the denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from featinv.diffusion import Diffusion
from featinv.errors import InputError, unknown

# (z_t (B, c, h, w), timesteps int64 (B,)) -> the network's prediction (B, c, h, w)
Denoiser = Callable[[Tensor, Tensor], Tensor]

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
class Sampler:
    """How features become images: the values of the config group `sampler`.

    Args:
        scheduler: `"ddim"` (Song et al. 2021), `"dpm_solver"` (DPM-Solver++ 2M, Lu et al. 2022)
            or `"unipc"` (Zhao et al. 2023).
        num_steps: Denoising steps.
        guidance_scale: Classifier-free guidance (Ho and Salimans 2022); 1 switches it off.
        eta: Share of fresh noise in a DDIM step, in [0, 1]; 0 is deterministic.
        guidance: What classifier-free guidance leads away from: `"features"` drops features and
            prompt, as in training; `"text"` drops the prompt only, as the original code does (a
            pair that its training never saw).

    Raises:
        InputError: A value out of its range.
    """

    scheduler: str = "dpm_solver"
    num_steps: int = 20
    guidance_scale: float = 1.75
    eta: float = 0.0
    guidance: str = "features"

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise unknown("scheduler", self.scheduler, SCHEDULERS)
        if self.guidance not in GUIDANCES:
            raise unknown("sampler.guidance", self.guidance, GUIDANCES)
        if not 1 <= self.num_steps <= 1000:
            raise InputError(f"sampler.num_steps is {self.num_steps}, expected 1 to 1000.")
        if not 0 <= self.guidance_scale < float("inf"):
            raise InputError(
                f"sampler.guidance_scale is {self.guidance_scale}, expected 0 or more "
                "(1 switches guidance off)."
            )
        if not 0 <= self.eta <= 1 or (self.eta and self.scheduler != "ddim"):
            raise InputError(
                f"sampler.eta is {self.eta} with scheduler {self.scheduler}, "
                "expected 0, or up to 1 with ddim."
            )

    def override(self, **values: object) -> "Sampler":
        """Return a copy with the values that are not None replaced."""
        return replace(self, **{key: value for key, value in values.items() if value is not None})

    def make_scheduler(self, diffusion: Diffusion) -> SchedulerMixin:
        """Return the diffusers scheduler for a diffusion, with its timesteps set.

        Raises:
            InputError: The scheduler cannot lay that many steps over the diffusion's timesteps:
                diffusers' rounding makes some numbers start far too late or step out of range.
        """
        scheduler_class, options = SCHEDULERS[self.scheduler]
        scheduler = scheduler_class(**diffusion.scheduler_config, **options)
        num_timesteps = diffusion.num_train_timesteps
        if self.num_steps <= num_timesteps:
            scheduler.set_timesteps(self.num_steps)
            first, last = scheduler.timesteps[0].item(), scheduler.timesteps[-1].item()
            covered = first + num_timesteps / self.num_steps >= 0.9 * num_timesteps
            if covered and first < num_timesteps and last >= 0:
                return scheduler
        raise InputError(
            f"sampler.num_steps is {self.num_steps}, which {self.scheduler} cannot space evenly "
            f"over {num_timesteps} timesteps; expected for example {-(-num_timesteps // 20)}."
        )


def classifier_free_guidance(
    conditional: Denoiser, unconditional: Denoiser, both: Denoiser, scale: float
) -> Denoiser:
    """Wrap denoisers by classifier-free guidance (Ho and Salimans 2022, Eq. 6).

    Args:
        conditional: Denoiser with the condition.
        unconditional: Denoiser without it.
        both: Denoiser of a batch of twice the size: with, then without the condition.
        scale: 1 is the conditional model alone, 0 the unconditional one; those cost one pass.
    """
    if scale == 1:
        return conditional
    if scale == 0:
        return unconditional

    def denoise(z_t: Tensor, timesteps: Tensor) -> Tensor:
        with_condition, without = both(
            torch.cat([z_t, z_t]), torch.cat([timesteps, timesteps])
        ).chunk(2)
        return without + scale * (with_condition - without)

    return denoise


def sample(
    denoise: Denoiser,
    noise: Tensor,
    scheduler: SchedulerMixin,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw latents by stepping through a scheduler's timesteps.

    Args:
        denoise: The (guided) denoiser.
        noise: Standard normal noise z_T, shape (B, c, h, w).
        scheduler: A diffusers scheduler whose timesteps are set.
        eta: Share of fresh noise in a DDIM step.
        generators: One generator for each sample, for that fresh noise.

    Returns:
        Latents z_0, same shape.
    """
    options = {"eta": eta, "generator": list(generators)} if eta else {}
    z_t = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        timesteps = torch.full((len(z_t),), int(timestep), device=z_t.device)
        prediction = denoise(scheduler.scale_model_input(z_t, timestep), timesteps)
        z_t = scheduler.step(prediction, timestep, z_t, **options).prev_sample
    return z_t
