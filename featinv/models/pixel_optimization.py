"""PixelOptimization: inversion by gradient descent on the pixels, to compare with."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from featinv.extractors import FeatureExtractor
from featinv.models.base import Inverter
from featinv.utils.errors import InputError, at_least, unknown
from featinv.utils.seeding import randn

ALPHA = 6  # exponent of the first prior, as in the paper; that of the second, beta, is 2
MOMENTUM = partial(torch.optim.SGD, lr=10, momentum=0.9)
START = 0.1  # standard deviation of the noise that the descent starts from


@dataclass(frozen=True)
class Descent:
    """Length of a descent of `PixelOptimization`.

    Args:
        num_steps: Gradient steps.

    Raises:
        InputError: Fewer than one.
    """

    num_steps: int

    def __post_init__(self) -> None:
        at_least("num_steps", self.num_steps, 1)

    def describe(self) -> str:
        """Return the settings in words."""
        return f"{self.num_steps} gradient steps on the pixels"


class PixelOptimization(Inverter):
    """Inversion by optimising pixels under a total-variation prior (Mahendran and Vedaldi 2015).

    Minimises |Phi(x) - Phi_0|^2 / |Phi_0|^2 + R_alpha(x) + R_V(x) (their Eqs. 1 to 4, in the
    balance of Sec. 3), where R_alpha keeps pixels in their range and R_V neighbours alike, from
    noise, by gradient descent with momentum whose rate falls tenfold twice. There is nothing to
    train; the samples of an image start from different noise.

    Args:
        backbone: The frozen encoder whose features are inverted.
        image_size: Side in pixels of the images that are made.
        conditioning: See `Inverter`.
        num_steps: Gradient steps.
        alpha_weight: Weight of R_alpha.
        tv_weight: Weight of R_V.
        tv_range: The change between neighbours that counts as usual, in the [-1, 1] range: the
            root mean square that makes R_V 1.
        optimizer: Makes the optimiser of the pixels; elementwise, or images would depend on the
            others of their batch. Its rate is for images of 128 px, and adapted to other sizes.

    Raises:
        InputError: A value out of its range.
    """

    def __init__(
        self,
        backbone: FeatureExtractor,
        image_size: int,
        conditioning: str = "spatial",
        num_steps: int = 200,
        alpha_weight: float = 1.0,
        tv_weight: float = 1.0,
        tv_range: float = 0.1,
        optimizer: Callable[[Iterable[Parameter]], Optimizer] = MOMENTUM,
    ) -> None:
        super().__init__(backbone, image_size, conditioning)
        self.make_optimizer = optimizer
        for name, value in {"alpha_weight": alpha_weight, "tv_weight": tv_weight}.items():
            if value < 0:
                raise InputError(f"model.{name} is {value}, expected 0 or more.")
        if tv_range <= 0:
            raise InputError(f"model.tv_range is {tv_range}, expected above 0, for example 0.1.")
        self.descent = Descent(num_steps)
        self.alpha_weight, self.tv_weight, self.tv_range = alpha_weight, tv_weight, tv_range

    def settings(self, **options: object) -> Descent:
        """Return the model's own `Descent`, or one of `num_steps`.

        Raises:
            InputError: Another option, or a value out of its range.
        """
        for name in options:
            if name != "num_steps":
                raise unknown("option of an optimisation of pixels", name, ("num_steps",))
        return replace(self.descent, **options)

    def draw(
        self,
        condition: Tensor,
        layer: str,
        settings: Descent,
        generators: list[torch.Generator],
    ) -> Tensor:
        """Make an image for each condition; see `Inverter.draw`.

        Raises:
            InputError: The descent diverges: its rate is too high.
        """
        shape = (3, self.image_size, self.image_size)
        images = Parameter(START * randn(shape, generators).to(self.device))
        optimizer = self.make_optimizer([images])
        # A mean over pixels leaves each of them a gradient that shrinks with the image's area.
        area = (self.image_size / 128) ** 2
        falls = [settings.num_steps // 2, 3 * settings.num_steps // 4]
        schedule = MultiStepLR(optimizer, falls, gamma=0.1)
        for _ in range(settings.num_steps):
            with torch.enable_grad():
                (area * self.energy(images, condition, layer).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if not images.isfinite().all():
            raise InputError(
                "The optimisation of pixels diverges: they are not finite after "
                f"{settings.num_steps} steps; expected a lower model.optimizer.lr."
            )
        return images.detach().clamp(-1, 1)

    def energy(self, images: Tensor, condition: Tensor, layer: str | None = None) -> Tensor:
        """Return what is minimised, shape (B,).

        Args:
            images: Shape (B, 3, H, W); [-1, 1] is the range of pictures.
            condition: Features as `condition` returns them, shape (B, C, h, w).
            layer: The backbone's layer that they are of; `None`: its own.
        """
        error = (self.condition(self.backbone.features(images, layer)) - condition).float()
        length = condition.float().square().sum(dim=(1, 2, 3)).clamp(min=1e-12)
        return (
            error.square().sum(dim=(1, 2, 3)) / length
            + self.alpha_weight * images.abs().pow(ALPHA).mean(dim=(1, 2, 3))
            + self.tv_weight * total_variation(images / self.tv_range)
        )


def total_variation(images: Tensor) -> Tensor:
    """Total variation R_V (Mahendran and Vedaldi 2015, Eq. 3), averaged over the pixels.

    Args:
        images: Shape (B, 3, H, W).

    Returns:
        Mean over pixels and colours of (dx^2 + dy^2)^(beta/2) with beta = 2, shape (B,), in the
        pixels' unit squared.
    """
    right = images[:, :, :-1, 1:] - images[:, :, :-1, :-1]
    below = images[:, :, 1:, :-1] - images[:, :, :-1, :-1]
    return (right.square() + below.square()).mean(dim=(1, 2, 3))
