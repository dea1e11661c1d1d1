"""Consistency: a loss between the features asked for and those of the image that is predicted."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from featinv.metrics import spatial_cosine
from featinv.utils.errors import InputError


@dataclass(frozen=True)
class Consistency:
    """The consistency feedback of ControlNet++ (Li et al. 2024, Eqs. 7 and 8), with features.

    ControlNet++ reads the condition back from the image that one denoising step predicts, and
    trains the ControlNet by how far it is from the condition that was given. There the reader is
    a segmenter or an edge detector; here it is the backbone, whose features are the condition. As
    there, the loss is for low noise only: further up, the predicted image is the blurred mean of
    many, whose features mean little.

    Args:
        weight: Of this loss beside the diffusion loss.
        max_timestep: Timesteps below it have the loss.

    Raises:
        InputError: A value out of its range.
    """

    weight: float = 1.0
    max_timestep: int = 500

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("max_timestep", self.max_timestep)):
            if not value > 0:
                raise InputError(
                    f"model.consistency.{name} is {value}, expected above 0; "
                    "model.consistency=null trains without."
                )

    def __call__(
        self,
        seen: Callable[[Tensor], Tensor],
        z_0: Tensor,
        features: Tensor,
        timesteps: Tensor,
        keep: Tensor,
    ) -> Tensor:
        """Return the weighted loss of each image, shape (B,): 1 - spatial cosine, or 0.

        Args:
            seen: Turns latents (n, c, h, w) into the condition (n, C, h', w') of their images.
            z_0: Predicted clean latents, shape (B, c, h, w).
            features: The condition that was given, shape (B, C, h', w').
            timesteps: Where the prediction was made, int64, shape (B,).
            keep: bool, shape (B,): False where the condition was dropped.
        """
        rows = (keep & (timesteps < self.max_timestep)).nonzero()[:, 0]
        loss = z_0.new_zeros(len(z_0))
        if len(rows) == 0:
            return loss
        cosine = spatial_cosine(seen(z_0[rows]), features[rows])
        return loss.index_put((rows,), self.weight * (1 - cosine))
