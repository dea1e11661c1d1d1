"""Information: how many bits of an image a layer keeps, estimated from the errors of a denoiser.

Let z = sqrt(snr) z_0 + eps be noised latents, y the features of their image, and

    mse(snr)     = E |z_0 - D(z)|^2       for a denoiser D that sees z alone,
    mse(snr | y) = E |z_0 - D(z, y)|^2    for one that sees the features too.

For optimal denoisers, the mutual information between features and noised latents is, in nats (Guo,
Shamai and Verdu 2005, Theorem 1; for diffusion models Kong, Brekelmans and Ver Steeg 2023, arXiv
2302.03792),

    I(y; z) = 1/2 int_0^snr [mse(g) - mse(g | y)] dg
            = 1/2 int [E |eps - eps(z)|^2 - E |eps - eps(z, y)|^2] d(log g),

since dg = g d(log g), and predicting z_0 amounts to predicting the noise with snr times the squared
error. Both integrands are sums over the elements of the latents and means over images and noise, so
bits belong to a position, a noise level and an image (Kong et al. 2024, arXiv 2310.07972).

Noise-free features may hold infinitely many bits of real-valued latents. The integral therefore
stops at a finest noise: it counts what the features say about the latents up to that precision.

The results are estimates. Excess error of the unconditional denoiser makes them too large, that of
the conditional one too small; an optimal conditional denoiser would give an upper bound, an optimal
unconditional one a lower bound. A small network errs even at low noise, where the integral
multiplies its errors by a large snr; there, let both denoisers use the noised latents themselves
(`guidance.epsilon_scaling`).
"""

from collections.abc import Callable, Sequence
from math import log
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from featinv.diffusion import Diffusion
from featinv.guidance import epsilon_scaling
from featinv.models.featinv import FeatInv
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import resize
from featinv.utils.seeding import Draw, make_generator, randn

# (z_t (B, c, h, w), timesteps int64 (B,)) -> predicted z_0 (B, c, h, w)
Denoiser = Callable[[Tensor, Tensor], Tensor]


class Information(NamedTuple):
    """Bits of N images, on the CPU.

    Args:
        maps: Bits at each position of the latents, shape (N, h, w).
        levels: Bits in each of K intervals of noise levels, from high to low noise, shape (N, K).
        bits_by_change: Another estimate of the bits, shape (N,), from |D(z) - D(z, y)|^2, which
            for optimal denoisers has the same mean as the gap between the errors (orthogonality
            principle; Kong et al. 2024). It is nonnegative and less noisy, but blind to whether the
            features help. Its distance from `bits` shows how far the denoisers are from optimal.
    """

    maps: Tensor
    levels: Tensor
    bits_by_change: Tensor

    @property
    def bits(self) -> Tensor:
        """Bits of each image, shape (N,); an image's may be negative by chance."""
        return self.levels.sum(dim=1)


class NoiseLevels:
    """Importance sampling of timesteps for the integral over log-SNR.

    The integral is a trapezoidal sum over timesteps, sum_t w_t g_t. Timestep t is drawn with
    probability p_t = w_t a_t^2 / Z and weighted by w_t / p_t = Z / a_t^2. For latents of variance
    1, a_t^2 bounds g_t per element: it is the squared error of the best linear prediction of the
    noise. Draws are stratified: one from each of K intervals of equal probability.

    Args:
        diffusion: The schedule.
        num_levels: Number of draws K.
        finest: Where the integral ends: the smallest s_t / a_t, the standard deviation of the noise
            in the latents' units; 0 uses the whole schedule.

    Raises:
        InputError: `num_levels` is below 1, or `finest` outside of the schedule.
    """

    def __init__(self, diffusion: Diffusion, num_levels: int, finest: float) -> None:
        self.num_levels = at_least("num_levels", num_levels, 1)
        alpha_bar = diffusion.alphas_cumprod.double().cpu().numpy()
        coarse = np.flatnonzero(np.sqrt(1 / alpha_bar - 1) >= finest)
        if finest < 0 or len(coarse) < 2:
            raise InputError(
                f"The finest noise is {finest}, expected 0 or more, for example 0.1, and less than "
                f"{np.sqrt(1 / alpha_bar[-1] - 1):.3g}, the largest of the schedule."
            )
        self.timesteps = coarse[::-1].copy()  # from high to low noise
        logsnr = np.log(alpha_bar / (1 - alpha_bar))[self.timesteps]
        middles = (logsnr[1:] + logsnr[:-1]) / 2
        edges = np.concatenate([logsnr[:1], middles, logsnr[-1:]])
        mass = np.diff(edges) * alpha_bar[self.timesteps]
        self.total = float(mass.sum())  # Z
        self.cumulative = np.concatenate([[0], mass.cumsum() / self.total])
        # Ends of the K intervals in log-SNR, shape (K + 1,)
        self.logsnr = np.interp(np.linspace(0, 1, num_levels + 1), self.cumulative, edges)

    def draw(self, level: int, uniform: Tensor) -> Tensor:
        """Map uniform numbers in [0, 1), shape (B,), to timesteps of one interval, shape (B,)."""
        quantile = (level + uniform.double().numpy()) / self.num_levels
        cell = np.searchsorted(self.cumulative, quantile, side="right") - 1
        return torch.from_numpy(self.timesteps[cell.clip(max=len(self.timesteps) - 1)])


@torch.no_grad()
def measure(
    z_0: Tensor,
    unconditional: Denoiser,
    conditional: Denoiser,
    diffusion: Diffusion,
    generators: Sequence[torch.Generator],
    levels: NoiseLevels,
) -> Information:
    """Estimate information from the errors of two denoisers under the same noise.

    With importance weights Z / a_t^2 and errors of z_0 rather than of the noise, each of the K
    draws contributes

        Z / a_t^2 * snr_t / 2 * gap / K = Z / (2 s_t^2) * gap / K  nats.

    Args:
        z_0: Latents of the images, shape (B, c, h, w).
        unconditional: Predicts them from noised latents.
        conditional: Predicts them from noised latents and the images' features.
        diffusion: Adds the noise.
        generators: One per image, for noise levels and noise.
        levels: Noise levels of the same diffusion.
    """
    maps, by_level, by_change = 0, [], 0
    for level in range(levels.num_levels):
        uniform = torch.stack([torch.rand((), generator=generator) for generator in generators])
        timesteps = levels.draw(level, uniform).to(z_0.device)
        z_t = diffusion.add_noise(z_0, randn(z_0.shape[1:], generators).to(z_0), timesteps)
        without, given = unconditional(z_t, timesteps), conditional(z_t, timesteps)
        _, s = diffusion.coefficients(timesteps)
        factor = levels.total / (2 * levels.num_levels * log(2)) / s.square()  # bits
        gap = factor * ((z_0 - without).square() - (z_0 - given).square())
        maps = maps + gap.sum(dim=1)
        by_level.append(gap.sum(dim=(1, 2, 3)))
        by_change = by_change + (factor * (without - given).square()).sum(dim=(1, 2, 3))
    return Information(maps.cpu(), torch.stack(by_level, dim=1).cpu(), by_change.cpu())


def bits_kept(
    model: FeatInv,
    images: Tensor,
    num_levels: int = 32,
    finest: float = 0.1,
    epsilon_scaling: float = 0.0,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int = 32,
) -> Information:
    """Estimate how many bits of images their features hold, with the model trained to invert them.

    Since features were dropped in training, one network serves as both denoisers. The module's
    docstring says what the numbers mean.

    Args:
        model: A FeatInv with a condition, in eval mode.
        images: Shape (N, 3, H, W) in [-1, 1].
        num_levels: Noise levels per image.
        finest: See `NoiseLevels`.
        epsilon_scaling: The error that `guidance.epsilon_scaling` corrects for, of a network that
            cannot copy its input; 0 uses its predictions as they are. `denoising_error` measures
            it.
        seed: Image i draws from the generator (seed, indices[i]), whatever the batch size.
        indices: Index of each image, shape (N,); `None` counts from 0.
        batch_size: Images per batch.

    Returns:
        Bits of the latents of the images at the model's resolution.

    Raises:
        InputError: A model without both denoisers, or a value out of range.
    """
    if not (isinstance(model, FeatInv) and model.controlnet is not None and model.cond_drop_prob):
        raise InputError(
            "Counting bits needs a denoiser with features and without: expected a FeatInv trained "
            "with conditioning=spatial or pooled, and with model.cond_drop_prob above 0."
        )
    levels = NoiseLevels(model.diffusion, num_levels, finest)
    indices = range(len(images)) if indices is None else indices
    parts = []
    for start in range(0, len(images), at_least("batch_size", batch_size, 1)):
        batch = images[start : start + batch_size].to(model.device)
        numbers = indices[start : start + batch_size]
        generators = [make_generator(seed, Draw.INFORMATION, int(i)) for i in numbers]
        with torch.no_grad():
            condition = model.condition(model.backbone.features(batch))
            z_0 = model.codec.encode(resize(batch, model.image_size), generators)
        parts.append(
            measure(
                z_0,
                denoiser(model, None, epsilon_scaling),
                denoiser(model, condition, epsilon_scaling),
                model.diffusion,
                generators,
                levels,
            )
        )
    return Information(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def denoising_error(model: FeatInv, images: Tensor, finest: float = 0.1, seed: int = 0) -> float:
    """Return the mean squared error of latents denoised without features at the finest noise.

    Args:
        model: The denoiser.
        images: Shape (N, 3, H, W) in [-1, 1].
        finest: The noise, as for `NoiseLevels`.
        seed: Seed of the noise.
    """
    timestep = NoiseLevels(model.diffusion, 1, finest).timesteps[-1]
    generators = [make_generator(seed, Draw.INFORMATION, i) for i in range(len(images))]
    images = resize(images.to(model.device), model.image_size)
    z_0 = model.codec.encode(images, generators)
    timesteps = torch.full((len(z_0),), int(timestep), device=z_0.device)
    z_t = model.diffusion.add_noise(z_0, randn(z_0.shape[1:], generators).to(z_0), timesteps)
    return float((denoiser(model, None)(z_t, timesteps) - z_0).square().mean())


def denoiser(model: FeatInv, condition: Tensor | None, error: float = 0.0) -> Denoiser:
    """Return a denoiser of the latents; see `predictor`, and `guidance.epsilon_scaling`."""
    predict, diffusion = predictor(model, condition), model.diffusion
    if error > 0:
        predict = epsilon_scaling(predict, diffusion, error)
    return lambda z_t, timesteps: diffusion.predicted_z_0(predict(z_t, timesteps), z_t, timesteps)


@torch.no_grad()
def predictor(model: FeatInv, condition: Tensor | None) -> Denoiser:
    """Return a model's network with its condition bound, which is encoded only once.

    Args:
        model: A FeatInv, or a prior.
        condition: Shape (B, C, h', w'), from `model.condition`; `None` drops it as training does.

    Returns:
        A function from z_t (B, c, h, w) and timesteps (B,) to the network's float32 prediction.
    """
    encoded = None
    if model.controlnet is not None:
        dropped = torch.zeros(1, *model.backbone.feature_shape, device=model.device)
        features = dropped if condition is None else condition
        encoded = model.feature_encoder(features, model.backbone.layer)

    def predict(z_t: Tensor, timesteps: Tensor) -> Tensor:
        keep = torch.full((len(z_t),), condition is not None, device=z_t.device)
        each = None if encoded is None else encoded.expand(len(z_t), -1, -1, -1)
        return model.predict(z_t, timesteps, model.context(keep), each).float()

    return predict
