"""Diffusion: noise schedule, prediction types and loss. All the maths, no networks."""

from diffusers import DDPMScheduler
from torch import Tensor, nn

from featinv.utils.errors import InputError, unknown

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Diffusion(nn.Module):
    """A variance-preserving diffusion in discrete time (Ho et al. 2020).

    z_t = a_t z_0 + s_t eps, with a_t^2 = alphas_cumprod[t] and s_t^2 = 1 - a_t^2.

    Args:
        prediction_type: What the network predicts: `"epsilon"` (the noise), `"v_prediction"`
            (a_t eps - s_t z_0; Salimans and Ho 2022) or `"sample"` (z_0).
        beta_schedule: A schedule of diffusers: `"scaled_linear"` is Stable Diffusion's.
        timestep_shift: Above 1, training visits high noise more often, where layout and colours
            are decided (Esser et al. 2024, Eq. 23); 1 draws the timesteps uniformly.

    Raises:
        InputError: Unknown prediction type or schedule.
    """

    num_train_timesteps = 1000

    def __init__(
        self,
        prediction_type: str = "epsilon",
        beta_schedule: str = "scaled_linear",
        timestep_shift: float = 1.0,
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise unknown("prediction type", prediction_type, PREDICTION_TYPES)
        if timestep_shift <= 0:
            raise InputError(
                f"timestep_shift is {timestep_shift}, expected above 0, for example 1."
            )
        self.scheduler_config = {
            "prediction_type": prediction_type,
            "beta_schedule": beta_schedule,
            "beta_start": 0.00085,  # the ends of Stable Diffusion's schedule
            "beta_end": 0.012,
            "num_train_timesteps": self.num_train_timesteps,
        }
        try:
            alphas_cumprod = DDPMScheduler(**self.scheduler_config).alphas_cumprod
        except NotImplementedError as error:
            raise InputError(
                f"Unknown beta schedule '{beta_schedule}': expected one of diffusers', "
                "for example scaled_linear or squaredcos_cap_v2."
            ) from error
        self.prediction_type = prediction_type
        self.timestep_shift = timestep_shift
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return a_t and s_t for timesteps (B,), each of shape (B, 1, 1, 1)."""
        alpha_bar = self.alphas_cumprod[timesteps][:, None, None, None]  # (B, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def training_timesteps(self, uniform: Tensor) -> Tensor:
        """Turn uniform numbers in [0, 1), shape (B,), into timesteps, int64, shape (B,)."""
        shifted = self.timestep_shift * uniform / (1 + (self.timestep_shift - 1) * uniform)
        return (shifted * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def add_noise(self, z_0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """Sample the forward process q(z_t | z_0) (Ho et al. 2020, Eq. 4).

        Args:
            z_0: Clean latents, shape (B, c, h, w).
            eps: Standard normal noise, same shape.
            timesteps: int64 in [0, num_train_timesteps), shape (B,).
        """
        a, s = self.coefficients(timesteps)
        return a * z_0 + s * eps

    def target(self, z_0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should predict, shape (B, c, h, w)."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return z_0
        a, s = self.coefficients(timesteps)
        return a * eps - s * z_0  # Salimans and Ho 2022, Appendix D

    def predicted_z_0(self, prediction: Tensor, z_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latents that a prediction at z_t stands for, shape (B, c, h, w)."""
        a, s = self.coefficients(timesteps)
        if self.prediction_type == "epsilon":
            return (z_t - s * prediction) / a
        if self.prediction_type == "sample":
            return prediction
        return a * z_t - s * prediction

    def prediction_of(self, z_0: Tensor, z_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return the prediction at z_t that stands for clean latents: undoes `predicted_z_0`."""
        a, s = self.coefficients(timesteps)
        if self.prediction_type == "epsilon":
            return (z_t - a * z_0) / s
        if self.prediction_type == "sample":
            return z_0
        return (a * z_t - z_0) / s

    def loss(self, prediction: Tensor, z_0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """Return the mean squared error of each sample, shape (B,), in float32."""
        error = prediction.float() - self.target(z_0, eps, timesteps).float()
        return error.square().mean(dim=(1, 2, 3))
