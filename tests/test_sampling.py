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
@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_many_steps_reach_the_exact_solution(name, schedule, prediction_type):
    diffusion = Diffusion(prediction_type, schedule)
    assert error(diffusion, name, 20) > error(diffusion, name, 250)
    assert error(diffusion, name, 250) < 0.025


def test_ddim_is_of_first_and_the_others_of_second_order():
    diffusion = Diffusion("v_prediction", "squaredcos_cap_v2")
    assert error(diffusion, "ddim", 50) / error(diffusion, "ddim", 100) == pytest.approx(2, abs=0.1)
    solver = [error(diffusion, "dpm_solver", num_steps) for num_steps in (10, 20, 40)]
    assert solver[0] > 3 * solver[1] > 9 * solver[2]
    for name in ("dpm_solver", "unipc"):
        assert error(diffusion, name, 20) < error(diffusion, "ddim", 20) / 4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_have_the_datas_distribution(name):
    diffusion = Diffusion("v_prediction", "squaredcos_cap_v2")
    noise = torch.randn(20_000, 2, 1, 1, generator=make_generator(1))
    scheduler = SamplerConfig(name, 100).make_scheduler(diffusion)
    latents = sample(best_denoiser(diffusion), noise, scheduler)
    torch.testing.assert_close(latents.mean((0, 2, 3)), MEAN.flatten(), atol=0.05, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), STD.flatten(), atol=0, rtol=0.05)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_denoiser_that_knows_the_answer_is_believed(prediction_type):
    """Any sampler must land on z_0 exactly if the prediction stands for it at every step."""
    diffusion = Diffusion(prediction_type)
    z_0 = torch.randn(2, 3, 4, 4)

    def denoise(z_t: Tensor, timesteps: Tensor) -> Tensor:
        a, s = diffusion.coefficients(timesteps)
        return diffusion.target(z_0, (z_t - a * z_0) / s, timesteps)

    for name in ("dpm_solver", "unipc"):
        scheduler = SamplerConfig(name, 10).make_scheduler(diffusion)
        latents = sample(denoise, torch.randn(2, 3, 4, 4), scheduler)
        torch.testing.assert_close(latents, z_0, atol=1e-3, rtol=1e-3)


def test_fifty_ddim_steps_visit_the_originals_timesteps():
    timesteps = SamplerConfig("ddim", 50).make_scheduler(Diffusion()).timesteps
    assert timesteps.tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize("name", ["dpm_solver", "unipc"])
def test_the_fast_solvers_start_at_the_last_timestep(name):
    timesteps = SamplerConfig(name, 20).make_scheduler(Diffusion()).timesteps.tolist()
    assert timesteps == list(range(999, 0, -50))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_denoiser_is_asked_once_a_step_with_a_batch_of_timesteps(name):
    asked = []

    def denoise(z_t: Tensor, timesteps: Tensor) -> Tensor:
        assert timesteps.dtype == torch.int64
        asked.append(timesteps.tolist())
        return torch.zeros_like(z_t)

    scheduler = SamplerConfig(name, 7).make_scheduler(Diffusion())
    sample(denoise, torch.randn(3, 2, 1, 1), scheduler)
    assert asked == [[t] * 3 for t in scheduler.timesteps.tolist()]


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


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_the_papers_loop(eta):
    diffusion = Diffusion()
    noise = torch.randn(3, 2, 4, 4, generator=make_generator(2))
    generators = [[make_generator(9, i) for i in range(3)] for _ in range(2)]
    ours = sample(best_denoiser(diffusion), noise, ddim(diffusion, 20), eta, generators[0])
    expected = naive_ddim(
        best_denoiser(diffusion), noise, diffusion.alphas_cumprod, 20, eta, generators[1]
    )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_fresh_noise_keeps_the_distribution():
    diffusion = Diffusion("v_prediction", "squaredcos_cap_v2")
    noise = torch.randn(2000, 2, 1, 1, generator=make_generator(3))
    generators = [make_generator(4, i) for i in range(2000)]
    latents = sample(best_denoiser(diffusion), noise, ddim(diffusion, 100), 1.0, generators)
    torch.testing.assert_close(latents.mean((0, 2, 3)), MEAN.flatten(), atol=0.15, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), STD.flatten(), atol=0, rtol=0.08)
    assert torch.corrcoef(torch.stack([noise[:, 0, 0, 0], latents[:, 0, 0, 0]]))[0, 1] < 0.2


def test_fresh_noise_depends_on_each_samples_own_generator_only():
    diffusion = Diffusion()
    noise = torch.randn(4, 2, 1, 1, generator=make_generator(5))

    def draw(rows: list[int]) -> Tensor:
        torch.manual_seed(len(rows))  # the global generator must not matter
        generators = [make_generator(6, row) for row in rows]
        scheduler = ddim(diffusion, 10)
        return sample(best_denoiser(diffusion), noise[rows], scheduler, 0.7, generators)

    together = draw([0, 1, 2, 3])
    assert torch.equal(draw([2]), together[2:3])
    assert torch.equal(draw([3, 1]), together[[3, 1]])
    plain = sample(best_denoiser(diffusion), noise, ddim(diffusion, 10))
    assert (plain - together).abs().min() > 1e-5


class Counted:
    """A denoiser that notes its calls."""

    def __init__(self, function) -> None:
        self.function, self.batches = function, []

    def __call__(self, z_t: Tensor, timesteps: Tensor) -> Tensor:
        assert len(z_t) == len(timesteps)
        self.batches.append(timesteps.tolist())
        return self.function(z_t, timesteps)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"scheduler": "dpmsolver"}, "did you mean dpm_solver"),
        ({"num_steps": 0}, "num_steps is 0, expected 1 to 1000"),
        ({"num_steps": 1001}, "num_steps is 1001"),
        ({"guidance_scale": -0.1}, "guidance_scale is -0.1, expected 0 or more"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"epsilon_scaling": -0.1}, "epsilon_scaling is -0.1, expected 0 or more"),
        ({"polish_steps": -1}, "polish_steps is -1"),
        ({"scheduler": "ddim", "eta": 1.1}, "eta is 1.1"),
        ({"scheduler": "ddim", "eta": -0.1}, "eta is -0.1"),
        ({"scheduler": "unipc", "eta": 0.5}, "eta is 0.5 with scheduler unipc"),
    ],
)
def test_values_out_of_their_range_are_bad_input(values, sentence):
    with pytest.raises(InputError, match=sentence):
        SamplerConfig(**values)
    with pytest.raises(InputError, match=sentence):
        SamplerConfig(scheduler="ddim").override(**values)


def test_override_replaces_what_is_given():
    sampler = SamplerConfig("ddim", 30, 2.0, eta=0.5)
    assert sampler.override(num_steps=None, guidance_scale=0.0) == SamplerConfig(
        "ddim", 30, 0.0, eta=0.5
    )
    assert sampler == SamplerConfig("ddim", 30, 2.0, eta=0.5)


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [
        ("ddim", 1000),  # diffusers would step to timestep 1000
        ("ddim", 600),  # ... start at timestep 600 of 1000
        ("dpm_solver", 61),  # ... end at timestep -1
        ("unipc", 499),
    ],
)
def test_steps_that_a_scheduler_cannot_space_are_bad_input(name, num_steps):
    with pytest.raises(InputError, match=f"num_steps is {num_steps}, which {name}.*example 50"):
        SamplerConfig(name, num_steps).make_scheduler(Diffusion())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_more_steps_than_timesteps_are_bad_input(name):
    with pytest.raises(InputError, match="over 100 timesteps; expected for example 5"):
        SamplerConfig(name, 200).make_scheduler(Diffusion(num_train_timesteps=100))


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
        seen.append(z_t.dtype)
        return best_denoiser(diffusion)(z_t, timesteps).bfloat16()

    noise = torch.randn(2, 2, 4, 4, generator=make_generator(0))
    latents = sample(half, noise, SamplerConfig(scheduler, 5).make_scheduler(diffusion))
    assert {latents.dtype, *seen} == {torch.float32}


def test_an_unknown_value_of_the_sampler():
    with pytest.raises(InputError, match="Unknown value of the sampler 'num_stps': did you mean"):
        SamplerConfig().override(num_stps=3)


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
