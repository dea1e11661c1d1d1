import pytest
import torch
from torch import Tensor

from featinv.diffusion import PREDICTION_TYPES, Diffusion
from featinv.guidance import Denoiser
from featinv.sampling import SCHEDULERS, SamplerConfig, sample, sample_images
from featinv.utils.errors import InputError
from featinv.utils.seeding import make_generator, randn

# Data of two channels, each a Gaussian of its own: the best denoiser is known in closed form.
MEAN = torch.tensor([0.8, -0.3]).view(1, 2, 1, 1)
STD = torch.tensor([0.5, 1.5]).view(1, 2, 1, 1)


def best_denoiser(diffusion: Diffusion) -> Denoiser:
    """Return E[target | z_t], where z_t ~ N(a MEAN, a^2 STD^2 + s^2)."""

    def denoise(z_t: Tensor, timesteps: Tensor) -> Tensor:
        alpha_bar = diffusion.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        standardised = (z_t - a * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar)
        z_0, eps = MEAN + a * STD**2 * standardised, s * standardised
        targets = {"epsilon": eps, "sample": z_0, "v_prediction": a * eps - s * z_0}
        return targets[diffusion.prediction_type]

    return denoise


def exact(noise: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Follow the probability flow ODE between two alpha_bar: the standardised z_t is constant."""
    standardised = (noise - start.sqrt() * MEAN) / (start * STD**2 + 1 - start).sqrt()
    return end.sqrt() * MEAN + (end * STD**2 + 1 - end).sqrt() * standardised


def error(diffusion: Diffusion, name: str, num_steps: int) -> float:
    """Return the largest distance between a sampler's end and the exact one."""
    noise = torch.randn(50, 2, 1, 1, generator=make_generator(0))
    scheduler = SamplerConfig(name, num_steps).make_scheduler(diffusion)
    start = diffusion.alphas_cumprod[scheduler.timesteps[0]]
    end = diffusion.alphas_cumprod[0] if name == "ddim" else torch.tensor(1.0)
    latents = sample(best_denoiser(diffusion), noise, scheduler)
    return (latents - exact(noise, start, end)).abs().max().item()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_many_steps_reach_the_exact_solution(name, prediction_type):
    schedule = "scaled_linear" if prediction_type == "epsilon" else "squaredcos_cap_v2"
    diffusion = Diffusion(prediction_type, schedule)
    assert error(diffusion, name, 20) > error(diffusion, name, 250)
    assert error(diffusion, name, 250) < 0.025


def test_fifty_ddim_steps_visit_the_originals_timesteps_and_others_start_at_the_last():
    timesteps = SamplerConfig("ddim", 50).make_scheduler(Diffusion()).timesteps
    assert timesteps.tolist() == list(range(981, 0, -20))
    for name in ("dpm_solver", "unipc"):
        timesteps = SamplerConfig(name, 20).make_scheduler(Diffusion()).timesteps
        assert timesteps.tolist() == list(range(999, 0, -50))


def ddim(diffusion: Diffusion, num_steps: int):
    return SamplerConfig("ddim", num_steps).make_scheduler(diffusion)


def naive_ddim(denoise, z_t: Tensor, alphas_cumprod: Tensor, num_steps, eta, generators) -> Tensor:
    """Song et al. (2021), Eq. 12 and 16, for a network that predicts the noise."""
    stride = 1000 // num_steps
    for t in reversed(range(1, 1000, stride)):
        now, later = alphas_cumprod[t], alphas_cumprod[max(t - stride, 0)]
        eps = denoise(z_t, torch.full((len(z_t),), t))
        z_0 = (z_t - (1 - now).sqrt() * eps) / now.sqrt()
        sigma = eta * ((1 - later) / (1 - now)).sqrt() * (1 - now / later).sqrt()
        z_t = later.sqrt() * z_0 + (1 - later - sigma**2).sqrt() * eps
        z_t = z_t + sigma * randn(z_t.shape[1:], generators)
    return z_t


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_ddim_is_the_papers_loop(eta):
    diffusion = Diffusion()
    noise = torch.randn(3, 2, 4, 4, generator=make_generator(2))
    generators = [[make_generator(9, i) for i in range(3)] for _ in range(2)]
    ours = sample(best_denoiser(diffusion), noise, ddim(diffusion, 20), eta, generators[0])
    expected = naive_ddim(
        best_denoiser(diffusion), noise, diffusion.alphas_cumprod, 20, eta, generators[1]
    )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"scheduler": "dpmsolver"}, "did you mean dpm_solver"),
        ({"num_steps": 1001}, "num_steps is 1001, expected 1 to 1000"),
        ({"guidance_scale": -0.1}, "guidance_scale is -0.1, expected 0 or more"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"eta": 1.1}, "eta is 1.1"),
        ({"scheduler": "unipc", "eta": 0.5}, "eta is 0.5 with scheduler unipc"),
        ({"transform_views": 0}, "transform_views is 0"),
        ({"num_stps": 3}, "Unknown value of the sampler 'num_stps': did you mean num_steps"),
    ],
)
def test_values_out_of_their_range_are_bad_input(values, sentence):
    with pytest.raises(InputError, match=sentence):
        SamplerConfig(scheduler="ddim").override(**values)


def test_override_replaces_what_is_given():
    changed = SamplerConfig("ddim", 30, 2.0, eta=0.5).override(num_steps=None, guidance_scale=0.0)
    assert changed == SamplerConfig("ddim", 30, 0.0, eta=0.5)


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [
        ("ddim", 1000),  # diffusers would step to timestep 1000
        ("ddim", 600),  # ... start at timestep 600 of 1000
        ("dpm_solver", 61),  # ... end at timestep -1
    ],
)
def test_steps_that_a_scheduler_cannot_space_are_bad_input(name, num_steps):
    with pytest.raises(InputError, match=f"num_steps is {num_steps}, which {name}.*example 50"):
        SamplerConfig(name, num_steps).make_scheduler(Diffusion())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_timesteps_of_every_number_of_steps_that_is_taken_are_sound(name):
    diffusion, taken = Diffusion(), 0
    for num_steps in [*range(1, 61), 75, 100, 111, 200, 250, 300, 400, 500]:
        try:
            timesteps = SamplerConfig(name, num_steps).make_scheduler(diffusion).timesteps
        except InputError:
            continue
        taken += 1
        assert len(timesteps) == num_steps
        assert timesteps.min() >= 0 and timesteps.max() < 1000
        assert (timesteps.diff() < 0).all()
    assert taken >= 66


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_latents_stay_float32_between_steps(scheduler):
    """Whatever type a network under autocast gives: diffusers would round the latents to it."""
    diffusion = Diffusion("v_prediction", "squaredcos_cap_v2")
    seen = []

    def half(z_t: Tensor, timesteps: Tensor) -> Tensor:
        assert (timesteps.dtype, len(timesteps)) == (torch.int64, 2)
        seen.append(z_t.dtype)
        return best_denoiser(diffusion)(z_t, timesteps).bfloat16()

    noise = torch.randn(2, 2, 4, 4, generator=make_generator(0))
    latents = sample(half, noise, SamplerConfig(scheduler, 5).make_scheduler(diffusion))
    assert [latents.dtype, *seen] == [torch.float32] * 6  # one call a step


class Pixels(torch.nn.Module):
    """The codec whose latents are the pixels."""

    def encode(self, images: Tensor) -> Tensor:
        return images

    decode = encode


def test_the_mean_over_views_tends_to_the_expectation():
    """Of a squared distance through noise, the expected gradient is the one without noise."""
    diffusion, target = Diffusion(), torch.rand(64, 3, 8, 8) - 0.5

    def denoise(z_t: Tensor, timesteps: Tensor) -> Tensor:
        return diffusion.prediction_of(torch.zeros_like(z_t), z_t, timesteps)

    def distance(images: Tensor) -> Tensor:
        return (images - target).square().sum((1, 2, 3))

    def error(views: int) -> float:
        config = SamplerConfig(
            num_steps=2,
            polish_steps=1,
            polish_step_size=0.1,
            transform_noise=1.0,
            transform_views=views,
        )
        generators = [torch.Generator().manual_seed(i) for i in range(64)]
        drawn = sample_images(denoise, distance, config, diffusion, Pixels(), (3, 8, 8), generators)
        return (1 - torch.cosine_similarity(drawn.flatten(1), target.flatten(1))).mean().item()

    one, nine = error(1), error(9)
    assert one > 0.01 and nine == pytest.approx(one / 9, rel=0.15)  # the noise's variance
