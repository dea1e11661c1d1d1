"""Guidance against closed forms: linear networks, linear distances, Gaussian data."""

import pytest
import torch
from test_sampling import best_denoiser
from torch import Tensor

from featinv.codecs import PatchPCA
from featinv.diffusion import PREDICTION_TYPES, Diffusion
from featinv.guidance import (
    Denoiser,
    classifier_free_guidance,
    epsilon_scaling,
    forward_guidance,
    into_pixel_range,
    polish,
)
from featinv.sampling import SamplerConfig, sample
from featinv.utils.seeding import make_generator


class Counted:
    """A denoiser that counts its calls."""

    def __init__(self, function: Denoiser) -> None:
        self.function, self.calls = function, 0

    def __call__(self, z_t: Tensor, timesteps: Tensor) -> Tensor:
        self.calls += 1
        return self.function(z_t, timesteps)


def guided(scale: float) -> tuple[Tensor, list[int], tuple[Tensor, Tensor]]:
    """Return the guided prediction, calls of each denoiser, and both parts of the formula."""
    z_t, timesteps = torch.randn(3, 2, 4, 4), torch.tensor([5, 6, 7])

    def with_condition(z_t: Tensor, timesteps: Tensor) -> Tensor:
        return z_t.sin() * timesteps.view(-1, 1, 1, 1)

    def without(z_t: Tensor, timesteps: Tensor) -> Tensor:
        return z_t.cos() + timesteps.view(-1, 1, 1, 1)

    def both(z_t: Tensor, timesteps: Tensor) -> Tensor:
        return torch.cat([with_condition(z_t[:3], timesteps[:3]), without(z_t[3:], timesteps[3:])])

    denoisers = [Counted(function) for function in (with_condition, without, both)]
    prediction = classifier_free_guidance(*denoisers, scale)(z_t, timesteps)
    calls = [denoiser.calls for denoiser in denoisers]
    return prediction, calls, (with_condition(z_t, timesteps), without(z_t, timesteps))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.75])
def test_guidance_follows_the_formula_in_as_few_passes_as_can_be(scale):
    prediction, calls, (conditional, unconditional) = guided(scale)
    expected = (1 - scale) * unconditional + scale * conditional
    torch.testing.assert_close(prediction, expected)
    assert calls == {0.0: [0, 1, 0], 1.0: [1, 0, 0]}.get(scale, [0, 0, 1])


# Epsilon scaling


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_epsilon_scaling_divides_the_predicted_noise(prediction_type):
    """Also noise that was predicted from z_t, as all networks do: no Bayes' rule is meant."""
    diffusion = Diffusion(prediction_type, "squaredcos_cap_v2")
    plain = best_denoiser(diffusion)
    z_t = torch.randn(4, 2, 4, 4, generator=make_generator(1))
    timesteps = torch.tensor([10, 300, 600, 900])
    a, s = diffusion.coefficients(timesteps)

    def eps(denoise: Denoiser) -> Tensor:
        z_0 = diffusion.predicted_z_0(denoise(z_t, timesteps), z_t, timesteps)
        return (z_t - a * z_0) / s

    scaled = epsilon_scaling(plain, diffusion, error=0.05)
    expected = eps(plain) / (1 + 0.05 * a**2 / s**2)
    torch.testing.assert_close(eps(scaled), expected, rtol=1e-3, atol=1e-3)


# Feature guidance


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_forward_guidance_moves_z_0_by_the_bounded_gradient_through_the_network(prediction_type):
    """For a network and a distance whose derivatives are known."""
    diffusion = Diffusion(prediction_type, "squaredcos_cap_v2")
    z_t = torch.randn(3, 2, 4, 4, generator=make_generator(1))
    timesteps = torch.tensor([20, 300, 999])
    _, s = diffusion.coefficients(timesteps)
    slope = torch.rand(1, 2, 4, 4, generator=make_generator(2))
    direction = torch.randn(2, 4, 4, generator=make_generator(3))

    def plain(z: Tensor, t: Tensor) -> Tensor:  # stands for z_0 = slope z_t
        return diffusion.prediction_of(slope * z, z, t)

    def distance(z_0: Tensor, noise_level: Tensor) -> Tensor:
        torch.testing.assert_close(noise_level, s.flatten())
        return 5 * (z_0 * direction).sum((1, 2, 3))

    guided = forward_guidance(plain, distance, diffusion, scale=0.3)
    moved = diffusion.predicted_z_0(guided(z_t, timesteps), z_t, timesteps)
    expected = slope * z_t - 0.3 * s**2 * slope * direction / direction.square().mean().sqrt()
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=2e-3)


def test_a_guided_mean_is_projected():
    diffusion = Diffusion("sample", "squaredcos_cap_v2")
    guided = forward_guidance(
        best_denoiser(diffusion),
        lambda z_0, _: z_0.sum((1, 2, 3)),
        diffusion,
        scale=100.0,
        project=lambda z_0: z_0.clamp(-1, 1),
    )
    z_0 = guided(torch.randn(1, 2, 4, 4), torch.tensor([900]))
    torch.testing.assert_close(z_0, -torch.ones_like(z_0))


@pytest.mark.parametrize(("scheduler", "eta"), [("ddim", 1.0), ("dpm_solver", 0.0), ("unipc", 0)])
def test_guided_samples_come_nearer(scheduler, eta):
    """All steps are guided, also those at the cosine schedule's end, where a_t vanishes."""
    diffusion = Diffusion("v_prediction", "squaredcos_cap_v2")
    plain = best_denoiser(diffusion)
    noise = torch.randn(20, 2, 1, 1, generator=make_generator(2))

    def distance(z_0: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return (z_0 - 0.5).square().sum(dim=(1, 2, 3))

    def end(denoise: Denoiser) -> Tensor:
        generators = [make_generator(3, i) for i in range(20)]
        config = SamplerConfig(scheduler, 20, eta=eta)
        return sample(denoise, noise, config.make_scheduler(diffusion), eta, generators)

    guided = forward_guidance(plain, distance, diffusion, scale=1.0)
    assert distance(end(guided)).mean() < 0.5 * distance(end(plain)).mean()


def test_polish_takes_shorter_and_shorter_steps_down_a_plane():
    z_0 = torch.randn(3, 2, 4, 4, generator=make_generator(0))
    direction = torch.randn(2, 4, 4, generator=make_generator(1))
    polished = polish(z_0, lambda z, level: (z * direction).sum((1, 2, 3)), 4, step_size=0.1)
    unit = direction / direction.square().mean().sqrt()
    torch.testing.assert_close(polished, z_0 - 0.1 * (1 + 0.75 + 0.5 + 0.25) * unit)


def test_polish_stays_where_there_is_no_gradient():
    z_0 = torch.zeros(1, 2, 4, 4)
    assert torch.equal(polish(z_0, lambda z, level: 0 * z.sum((1, 2, 3)), 2, 1.0), z_0)


def test_the_projection_gives_what_the_codec_makes_of_clamped_images():
    codec = PatchPCA(192 // 4)
    inside = codec.encode(torch.rand(2, 3, 16, 16, generator=make_generator(0)) - 0.5)
    project = into_pixel_range(codec)
    torch.testing.assert_close(project(inside), inside, rtol=0, atol=1e-4)
    outside = codec.encode(torch.full((1, 3, 16, 16), 3.0))
    assert codec.decode(project(outside)).abs().max() < codec.decode(outside).abs().max()
