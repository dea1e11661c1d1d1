from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from featinv import InputError
from featinv.analysis.information import (
    NoiseLevels,
    bits_kept,
    denoiser,
    denoising_error,
    measure,
)
from featinv.checkpoints import build_model
from featinv.diffusion import Diffusion
from featinv.utils.seeding import make_generator

SHAPE = CHANNELS, SIDE, _ = 2, 8, 8
SIZE = CHANNELS * SIDE * SIDE


class Problem:
    """z_0 ~ N(0, C) with correlated neighbours, y = z_0 + noise at the positions that are seen.

    Then z_0 given y ~ N(m(y), P), the best denoisers are linear, and by the information of Gaussian
    channels I(y; z) = 1/2 log det(1 + snr C) - 1/2 log det(1 + snr P).
    """

    def __init__(self, blind: bool = False, finest: float = 0.0) -> None:
        self.diffusion = Diffusion("sample", "squaredcos_cap_v2")
        self.finest = finest
        line = torch.arange(SIDE, dtype=torch.float64)
        near = 0.3 ** (line[:, None] - line).abs()
        channels = torch.diag(torch.tensor([1.6, 0.4], dtype=torch.float64))
        self.prior = torch.kron(channels, torch.kron(near, near))
        seen = torch.ones(SHAPE, dtype=torch.bool)
        if blind:
            seen[:, SIDE // 2 :, SIDE // 2 :] = False
        self.seen, self.noise = seen.flatten(), 0.2
        gain = self.prior[:, self.seen] @ torch.linalg.inv(
            self.prior[self.seen][:, self.seen] + self.noise * torch.eye(int(self.seen.sum()))
        )
        self.gain = gain
        posterior = self.prior - gain @ self.prior[self.seen]
        self.posterior = (posterior + posterior.T) / 2

    def denoiser(self, mean: Tensor, covariance: Tensor):
        """E[z_0 | z_t] for z_0 ~ N(mean, covariance), for each row another mean."""
        values, vectors = torch.linalg.eigh(covariance)

        def denoise(z_t: Tensor, timesteps: Tensor) -> Tensor:
            a, s = (x[:, :, 0, 0].double() for x in self.diffusion.coefficients(timesteps))
            gain = a * values / (a**2 * values + s**2)  # (B, D)
            rotated = (z_t.flatten(1).double() - a * mean) @ vectors
            return (mean + (gain * rotated) @ vectors.T).view(z_t.shape)

        return denoise

    def measure(self, number: int, seed: int = 0, num_levels: int = 32):
        generator = torch.Generator().manual_seed(seed)
        root = torch.linalg.cholesky(self.prior)
        z_0 = torch.randn(number, SIZE, generator=generator, dtype=torch.float64) @ root.T
        noise = torch.randn(number, SIZE, generator=generator, dtype=torch.float64)
        y = (z_0 + self.noise**0.5 * noise)[:, self.seen]
        return measure(
            z_0.view(number, *SHAPE),
            self.denoiser(torch.zeros(SIZE), self.prior),
            self.denoiser(y @ self.gain.T, self.posterior),
            self.diffusion,
            [make_generator(seed, i) for i in range(number)],
            self.levels(num_levels),
        )

    def levels(self, num_levels: int) -> NoiseLevels:
        return NoiseLevels(self.diffusion, num_levels, self.finest)

    def analytic(self, num_levels: int = 32) -> np.ndarray:
        """Bits I(y; z) at the ends of the intervals of noise levels, shape (K + 1,)."""
        prior, posterior = (torch.linalg.eigvalsh(x) for x in (self.prior, self.posterior))
        snr = torch.from_numpy(self.levels(num_levels).logsnr).exp()[:, None]
        nats = (torch.log1p(snr * prior) - torch.log1p(snr * posterior)).sum(dim=1) / 2
        return (nats / log(2)).numpy()


@pytest.mark.parametrize("finest", [0.0, 0.3])
def test_the_mutual_information_of_a_gaussian_channel(finest):
    problem = Problem(finest=finest)
    found = problem.measure(256)
    bits = problem.analytic()
    expected = bits[-1] - bits[0]
    assert float(found.bits.mean()) == pytest.approx(expected, rel=0.02)
    assert float(found.bits_by_change.mean()) == pytest.approx(expected, rel=0.02)
    torch.testing.assert_close(found.maps.sum(dim=(1, 2)), found.bits)
    # At each noise level, too; and the standard error over images is honest.
    error = found.levels.std(0) / len(found.levels) ** 0.5
    off = (found.levels.mean(0) - torch.from_numpy(np.diff(bits))) / error
    assert off.square().mean() < 2 and off.abs().max() < 4


def test_unseen_positions_hold_hardly_any_bits():
    found = Problem(blind=True).measure(256).maps.mean(0)
    blind = found[SIDE // 2 :, SIDE // 2 :].mean()
    others = (found.sum() - blind * (SIDE // 2) ** 2) / (SIDE**2 * 3 / 4)
    assert 0 < blind <= 0.05 * others  # what neighbours tell of it is not nothing


def test_errors_of_the_denoisers_bias_the_bits_as_documented():
    problem = Problem()
    expected = np.diff(problem.analytic()[[0, -1]])[0]
    best = problem.denoiser

    def too_gray(mean: Tensor, covariance: Tensor):
        return lambda z_t, timesteps: 0.8 * best(mean, covariance)(z_t, timesteps)

    problem.denoiser = lambda mean, covariance: (
        too_gray(mean, covariance) if mean.ndim == 2 else best(mean, covariance)
    )
    assert problem.measure(64).bits.mean() < 0.9 * expected  # the conditional one is worse
    problem.denoiser = lambda mean, covariance: (
        too_gray(mean, covariance) if mean.ndim == 1 else best(mean, covariance)
    )
    assert problem.measure(64).bits.mean() > 1.1 * expected


def test_weights_of_timesteps_integrate_over_log_snr():
    diffusion = Diffusion()
    levels = NoiseLevels(diffusion, num_levels=5, finest=0.1)
    alpha_bar = diffusion.alphas_cumprod.double().numpy()
    logsnr = np.log(alpha_bar / (1 - alpha_bar))
    used = np.exp(-logsnr / 2) >= 0.1
    grid = np.linspace(0, 1, 20001)[:-1]
    draws = torch.cat([levels.draw(k, torch.from_numpy(grid)) for k in range(5)]).numpy()
    assert set(draws) == set(np.flatnonzero(used))
    integral = np.mean(levels.total / alpha_bar[draws] * np.exp(-np.square(logsnr[draws])))
    naive = -np.trapezoid(np.exp(-np.square(logsnr[used])), logsnr[used])
    assert integral == pytest.approx(naive, rel=1e-3)
    high, low = (levels.draw(k, torch.tensor([0.5])) for k in (0, 4))
    assert high > low and (np.diff(levels.logsnr) > 0).all()
    assert levels.logsnr[-1] == pytest.approx(-2 * log(0.1), abs=0.1)


# With a network


def test_bits_depend_on_seed_and_number_only(awake_model, images):
    model = awake_model.eval()
    whole = bits_kept(model, images, num_levels=3, seed=1)
    assert whole.maps.shape == (3, 4, 4) and whole.levels.shape == (3, 3)
    assert (whole.bits_by_change > 0).all()
    single = bits_kept(model, images[2:], num_levels=3, seed=1, indices=[2])
    batches = bits_kept(model, images, num_levels=3, seed=1, batch_size=2)
    for name in ("maps", "levels", "bits_by_change"):
        torch.testing.assert_close(getattr(batches, name), getattr(whole, name))
        torch.testing.assert_close(getattr(single, name)[0], getattr(whole, name)[2])
    assert not torch.allclose(bits_kept(model, images, 3, seed=2).bits, whole.bits)


def test_features_are_encoded_once_for_all_noise_levels(awake_model, images):
    model, calls = awake_model.eval(), []
    hook = model.feature_encoder.register_forward_hook(lambda *args: calls.append(args))
    bits_kept(model, images, num_levels=5)
    hook.remove()
    assert len(calls) == 2  # with features and without


def test_a_network_that_ignores_the_features_keeps_no_bits(tiny_model, images):
    assert not bits_kept(tiny_model.eval(), images, num_levels=2).maps.any()


@torch.no_grad()
def test_without_a_condition_the_features_are_dropped_as_in_training(awake_model, images):
    model = awake_model.eval()
    condition = model.condition(model.backbone.features(images))
    z_t = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([10, 500, 900])
    dropped, zero, given, averaged = (
        denoiser(model, *arguments)(z_t, timesteps)
        for arguments in ((None,), (0 * condition,), (condition,), (None, 0.09))
    )
    torch.testing.assert_close(dropped, zero)
    assert not torch.allclose(dropped, given)
    # By a network's error, the mean with what the latents themselves say: z_t / a.
    a, s = model.diffusion.coefficients(timesteps)
    expected = (0.09 * a * z_t + s**2 * dropped) / (0.09 * a**2 + s**2)
    torch.testing.assert_close(averaged, expected, rtol=1e-3, atol=1e-3)


def test_the_error_is_that_of_the_denoiser_at_the_finest_noise(awake_model, images):
    model = awake_model.eval()
    model.predict = lambda z_t, timesteps, *_: 0.5 * torch.ones_like(z_t)
    model.diffusion = Diffusion("sample", "squaredcos_cap_v2")
    z_0 = model.codec.encode(images)
    expected = float((z_0 - 0.5).square().mean())
    assert denoising_error(model, images, finest=0.1) == pytest.approx(expected)


def test_bad_input(tiny_config, images):
    for config, values, sentence in (
        ({"cond_drop_prob": 0.0}, {}, "with model.cond_drop_prob above 0"),
        ({"conditioning": "none"}, {}, "a FeatInv trained with conditioning=spatial or pooled"),
        ({}, {"num_levels": 0}, "num_levels is 0"),
        ({}, {"finest": -1}, "The finest noise is -1, expected 0 or more"),
        ({}, {"finest": 1e9}, "The finest noise is 1000000000.0, .* less than"),
    ):
        with pytest.raises(InputError, match=sentence):
            bits_kept(build_model(tiny_config | config), images, **values)
