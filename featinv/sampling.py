"""Sampling: a denoiser and a scheduler turn noise into latents; guidance wraps the denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from featinv.diffusion import Diffusion
from featinv.utils.errors import InputError, unknown

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
class SamplerConfig:
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
        feature_guidance_scale: Length of a step of (backward) feature guidance: its root mean
            square in the latents' units; 0 is off.
        feature_guidance_iterations: Steps of it in each denoising step.
        forward_guidance_scale: Strength of forward feature guidance, whose gradient goes through
            the network: a factor of the change of the noise; 0 is off.
        feature_guidance_steps: How many of the denoising steps are guided, the last ones; `None`:
            all of them.
        network_error: Mean squared error, in the latents' units, that the network's prediction of
            the clean latents has even where there is hardly any noise; above 0, predictions are
            averaged with what the noised latents say themselves (see `keep_input`).

    Raises:
        InputError: A value out of its range.
    """

    scheduler: str = "dpm_solver"
    num_steps: int = 20
    guidance_scale: float = 1.75
    eta: float = 0.0
    guidance: str = "features"
    feature_guidance_scale: float = 0.0
    feature_guidance_iterations: int = 1
    forward_guidance_scale: float = 0.0
    feature_guidance_steps: int | None = None
    network_error: float = 0.0

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
        for name in ("feature_guidance_scale", "forward_guidance_scale", "network_error"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise InputError(
                    f"sampler.{name} is {value}, expected 0 or more (0 switches it off)."
                )
        for name in ("feature_guidance_iterations", "feature_guidance_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"sampler.{name} is {value}, expected 1 or more.")
        if not 0 <= self.eta <= 1 or (self.eta and self.scheduler != "ddim"):
            raise InputError(
                f"sampler.eta is {self.eta} with scheduler {self.scheduler}, "
                "expected 0, or up to 1 with ddim."
            )

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
    def sees_features(self) -> bool:
        """Whether any guidance by the gradient of the feature distance is on."""
        return self.feature_guidance_scale > 0 or self.forward_guidance_scale > 0

    def describe(self) -> str:
        """Return the values that matter, for a caption."""
        text = f"{self.scheduler}, {self.num_steps} steps, guidance {self.guidance_scale:g}"
        if self.network_error:
            text += f", network error {self.network_error:g}"
        if self.feature_guidance_scale:
            text += (
                f", feature guidance {self.feature_guidance_scale:g} x "
                f"{self.feature_guidance_iterations}"
            )
        if self.forward_guidance_scale:
            text += f", forward guidance {self.forward_guidance_scale:g}"
        if self.sees_features:
            guided = self.feature_guidance_steps
            text += f" in {f'the last {guided}' if guided else 'all'} steps"
        return text

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


def keep_input(denoise: Denoiser, diffusion: Diffusion, error: float) -> Denoiser:
    """Wrap a denoiser so that it keeps what the noised latents say of the clean ones already.

    A small network that predicts the clean latents cannot copy its input: even where there is
    hardly any noise, its prediction is off, and would lose at each step what earlier ones drew.
    This takes the prediction p for a Gaussian N(p, error) of the clean latents, and z_t for an
    observation of them, N(z_0; z_t / a_t, s_t^2 / a_t^2); the mean by Bayes' rule is

        z_0 = (error a_t z_t + s_t^2 p) / (error a_t^2 + s_t^2).

    At high noise that is the prediction, at low noise what is there.

    Args:
        denoise: The denoiser, e.g. with classifier-free guidance.
        diffusion: Whose prediction the denoiser makes.
        error: Mean squared error of the predicted clean latents, in their units.
    """

    def keeping(z_t: Tensor, timesteps: Tensor) -> Tensor:
        predicted = diffusion.predicted_z_0(denoise(z_t, timesteps), z_t, timesteps)
        a, s = diffusion.coefficients(timesteps)
        z_0 = (error * a * z_t + s**2 * predicted) / (error * a**2 + s**2)
        return diffusion.prediction_of(z_0, z_t, timesteps)

    return keeping


def feature_guidance(
    denoise: Denoiser,
    distance: Callable[[Tensor], Tensor],
    diffusion: Diffusion,
    scale: float,
    iterations: int = 1,
    first_timestep: int | None = None,
) -> Denoiser:
    """Wrap a denoiser so that the image it predicts has the features that are asked for.

    The backward guidance of universal guidance (Bansal et al. 2023, Eqs. 7 and 8): gradient
    descent on the predicted clean latents, at every denoising step, after which the network is
    taken to have predicted these. No gradient goes through the network, so a step costs one pass
    forward and back through codec and backbone. The steps have a fixed length, as the gradient's
    own says little: it differs by orders of magnitude between backbones and timesteps.

    Args:
        denoise: The denoiser, e.g. with classifier-free guidance.
        distance: Maps clean latents (B, c, h, w) to the distance of their images' features to
            those asked for, shape (B,).
        diffusion: Whose prediction the denoiser makes.
        scale: Root mean square of a step, in the latents' units.
        iterations: Gradient steps at each denoising step.
        first_timestep: Where guidance begins, coming from high noise; `None`: at once.
    """

    def guided(z_t: Tensor, timesteps: Tensor) -> Tensor:
        prediction = denoise(z_t, timesteps)
        if first_timestep is not None and timesteps[0] > first_timestep:
            return prediction
        z_0 = diffusion.predicted_z_0(prediction, z_t, timesteps)
        for _ in range(iterations):
            with torch.enable_grad():
                z_0 = z_0.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(distance(z_0).sum(), z_0)
            z_0 = z_0.detach() - scale * _of_unit_length(gradient)
        return diffusion.prediction_of(z_0, z_t, timesteps)

    return guided


def forward_guidance(
    denoise: Denoiser,
    distance: Callable[[Tensor], Tensor],
    diffusion: Diffusion,
    scale: float,
    first_timestep: int | None = None,
) -> Denoiser:
    """Wrap a denoiser so that the noise it predicts leads towards the features asked for.

    The forward guidance of universal guidance (Bansal et al. 2023, Eq. 6): the predicted noise gets
    scale s_t times the gradient of the distance, by the noised latents, so through the network too.
    The gradient by the predicted clean latents is scaled to a root mean square of 1, for the reason
    given in `feature_guidance`; what the network makes of it on the way back stays, which keeps
    guidance gentle at high noise, where it hardly knows the image.

    Args:
        denoise: The denoiser; gradients go through it.
        distance: As in `feature_guidance`.
        diffusion: Whose prediction the denoiser makes.
        scale: Strength s of Bansal et al.: 0 changes nothing.
        first_timestep: Where guidance begins, coming from high noise; `None`: at once.
    """

    def guided(z_t: Tensor, timesteps: Tensor) -> Tensor:
        if first_timestep is not None and timesteps[0] > first_timestep:
            return denoise(z_t, timesteps)
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_()
            prediction = denoise(z_t, timesteps)
            z_0 = diffusion.predicted_z_0(prediction, z_t, timesteps)
            (gradient,) = torch.autograd.grad(distance(z_0).sum(), z_0, retain_graph=True)
            (gradient,) = torch.autograd.grad(z_0, z_t, _of_unit_length(gradient))
        a, s = diffusion.coefficients(timesteps)
        # eps + scale s_t gradient, told as the clean latents that this noise leaves
        z_0 = z_0.detach() - scale * s * s / a * gradient
        return diffusion.prediction_of(z_0, z_t.detach(), timesteps)

    return guided


def _of_unit_length(gradient: Tensor) -> Tensor:
    """Scale each sample's gradient to a root mean square of 1."""
    length = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return gradient / length.clamp(min=1e-12)


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
