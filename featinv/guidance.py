"""Guidance: wrappers of a denoiser, and gradient steps on a clean image, towards a condition.

Every wrapper takes a denoiser and returns one, so they combine freely. All work in terms of the
predicted clean latents z_0, whatever the network predicts. In z_t = a_t z_0 + s_t eps, a_t and s_t
are the coefficients of `featinv.diffusion.Diffusion`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from featinv.diffusion import Diffusion

# (z_t (B, c, h, w), timesteps int64 (B,)) -> the network's prediction (B, c, h, w)
Denoiser = Callable[[Tensor, Tensor], Tensor]
# (z_0 (B, c, h, w), noise level s_t (B,)) -> distance of each image to what is wanted (B,)
Distance = Callable[[Tensor, Tensor], Tensor]
# Predicted clean latents to the nearest ones that an image can have
Projection = Callable[[Tensor], Tensor]


def classifier_free_guidance(
    conditional: Denoiser, unconditional: Denoiser, both: Denoiser, scale: float
) -> Denoiser:
    """Combine two denoisers (Ho and Salimans 2022, Eq. 6, with scale = w + 1).

    Args:
        conditional: Denoiser given the condition.
        unconditional: Denoiser without it.
        both: Both in one pass: given z_t and timesteps twice, it returns the conditional
            prediction of the first half and the unconditional one of the second.
        scale: 1 is the conditional denoiser, 0 the unconditional one; above 1 extrapolates.
    """
    if scale == 1:
        return conditional
    if scale == 0:
        return unconditional

    def guided(z_t: Tensor, timesteps: Tensor) -> Tensor:
        cond, uncond = both(torch.cat([z_t, z_t]), torch.cat([timesteps, timesteps])).chunk(2)
        return torch.lerp(uncond, cond, scale)

    return guided


def epsilon_scaling(denoise: Denoiser, diffusion: Diffusion, error: float) -> Denoiser:
    """Shrink the predicted noise where there is hardly any (Ning et al. 2024, Sec. 4).

    A network whose prediction of the clean latents errs by a variance `error` predicts noise that
    is too long, by a factor that grows with SNR_t = a_t^2 / s_t^2, and sampling drifts away from
    what training saw (exposure bias; "Elucidating the exposure bias in diffusion models", arXiv
    2308.15321). This takes eps' = eps / (1 + error SNR_t), in terms of z_0

        z_0' = (error a_t z_t + s_t^2 z_0) / (error a_t^2 + s_t^2).

    A small network that cannot copy even a clean input would otherwise lose at each of the last
    steps what earlier ones drew.

    Args:
        denoise: Any denoiser.
        diffusion: Whose prediction it makes.
        error: Mean squared error of the predicted clean latents where hardly any noise is left.
    """

    def scaled(z_t: Tensor, timesteps: Tensor) -> Tensor:
        z_0 = diffusion.predicted_z_0(denoise(z_t, timesteps), z_t, timesteps)
        a, s = diffusion.coefficients(timesteps)
        z_0 = (error * a * z_t + s**2 * z_0) / (error * a**2 + s**2)
        return diffusion.prediction_of(z_0, z_t, timesteps)

    return scaled


def forward_guidance(
    denoise: Denoiser,
    distance: Distance,
    diffusion: Diffusion,
    scale: float,
    project: Projection | None = None,
) -> Denoiser:
    """Guide the predicted clean latents down a distance.

    The forward guidance of universal guidance (Bansal et al. 2023, Eq. 6), bounded. There the noise
    changes by a multiple of s_t times the gradient of the distance by z_t, through the network,
    which moves z_0 by s_t^2 / a_t times the gradient: a factor without bound at high noise. Here

        z_0' = project(z_0 - scale s_t^2 h),

    where h is the gradient scaled to unit length, as its own length differs by orders of magnitude
    between backbones and timesteps.

    Args:
        denoise: The denoiser; gradients go through it.
        distance: The distance to reduce.
        diffusion: Whose prediction the denoiser makes.
        scale: Euclidean length of a step at full noise, in the latents' units.
        project: Applied to the moved z_0, e.g. `into_pixel_range`.
    """

    def guided(z_t: Tensor, timesteps: Tensor) -> Tensor:
        _, s = diffusion.coefficients(timesteps)
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_()
            z_0 = diffusion.predicted_z_0(denoise(z_t, timesteps), z_t, timesteps)
            (gradient,) = torch.autograd.grad(
                distance(z_0, s[:, 0, 0, 0]).sum(), z_0, retain_graph=True
            )
            (gradient,) = torch.autograd.grad(z_0, z_t, _unit(gradient))
        z_0 = z_0.detach() - scale * s**2 * gradient
        if project is not None:
            z_0 = project(z_0)
        return diffusion.prediction_of(z_0, z_t.detach(), timesteps)

    return guided


def polish(
    z_0: Tensor,
    distance: Distance,
    num_steps: int,
    step_size: float,
    project: Projection | None = None,
) -> Tensor:
    """Take gradient steps on clean latents, of a length that falls to zero.

    The backward guidance of universal guidance (Bansal et al. 2023, Eq. 7), once and at the end: no
    gradient goes through the network.

    Args:
        z_0: Clean latents, shape (B, c, h, w).
        distance: The distance to reduce.
        num_steps: Gradient steps.
        step_size: Root mean square of the first step, in the latents' units.
        project: Applied after each step, e.g. `into_pixel_range`.

    Returns:
        Latents, same shape.
    """
    clean = z_0.new_zeros(len(z_0))
    for step in range(num_steps):
        with torch.enable_grad():
            z_0 = z_0.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(distance(z_0, clean).sum(), z_0)
        z_0 = z_0.detach() - step_size * (1 - step / num_steps) * _unit(gradient)
        z_0 = z_0 if project is None else project(z_0)
    return z_0


def into_pixel_range(codec: torch.nn.Module) -> Projection:
    """Return the projection of latents to those of images in [-1, 1].

    Args:
        codec: A linear one such as `featinv.codecs.PatchPCA`, for which decoding, clamping and
            encoding again is cheap and changes nothing else.
    """
    return lambda z_0: codec.encode(codec.decode(z_0).clamp(-1, 1))


def _unit(gradient: Tensor) -> Tensor:
    """Scale each sample's gradient to a root mean square of 1; a gradient of zero stays."""
    rms = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return gradient / rms.clamp(min=1e-12)
