import pytest
import torch
from diffusers import DDPMScheduler

from featinv.diffusion import PREDICTION_TYPES, Diffusion
from featinv.utils.errors import InputError

SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z_0, eps and timesteps, the first and the last one among them."""
    generator = torch.Generator().manual_seed(0)
    z_0, eps = torch.randn(2, 6, 3, 4, 5, generator=generator)
    return z_0, eps, torch.tensor([0, 1, 250, 600, 900, 998])


def test_the_default_is_stable_diffusions_schedule():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - betas).cumprod(0)
    torch.testing.assert_close(Diffusion().alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_and_targets_are_those_of_diffusers(schedule, batch):
    scheduler = DDPMScheduler(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012)
    z_0, eps, timesteps = batch
    z_t = Diffusion(beta_schedule=schedule).add_noise(z_0, eps, timesteps)
    torch.testing.assert_close(z_t, scheduler.add_noise(z_0, eps, timesteps))
    for prediction_type, expected in {
        "epsilon": eps,
        "sample": z_0,
        "v_prediction": scheduler.get_velocity(z_0, eps, timesteps),
    }.items():
        target = Diffusion(prediction_type, schedule).target(z_0, eps, timesteps)
        torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predicted_z_0_of_the_true_target_inverts_add_noise(prediction_type, batch):
    z_0, eps, timesteps = batch
    diffusion = Diffusion(prediction_type, "squaredcos_cap_v2").double()
    z_0, eps = z_0.double(), eps.double()
    z_t = diffusion.add_noise(z_0, eps, timesteps)
    target = diffusion.target(z_0, eps, timesteps)
    recovered = diffusion.predicted_z_0(target, z_t, timesteps)
    torch.testing.assert_close(recovered, z_0, atol=1e-6, rtol=1e-6)
    again = diffusion.prediction_of(recovered, z_t, timesteps)
    torch.testing.assert_close(again, target, rtol=1e-3, atol=1e-3)


def test_loss_of_a_half_precision_prediction_is_single_precision(batch):
    z_0, eps, timesteps = batch
    losses = Diffusion().loss(eps.bfloat16(), z_0, eps, timesteps)
    assert losses.dtype == torch.float32
    assert 0 < losses.max() < 1e-4  # bfloat16 keeps 8 bits


def test_unknown_prediction_type_and_schedule_are_bad_input():
    with pytest.raises(InputError, match="did you mean v_prediction"):
        Diffusion("v-prediction")
    with pytest.raises(InputError, match="'cosine'.*squaredcos_cap_v2"):
        Diffusion(beta_schedule="cosine")
