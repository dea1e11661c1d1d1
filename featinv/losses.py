"""Losses beside the diffusion loss: what a frozen network sees of the predicted image."""

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from featinv.backbones import Backbone
from featinv.metrics import spatial_cosine
from featinv.transforms import Transform, transform_all
from featinv.utils.errors import InputError
from featinv.utils.pixels import resize


class PerceptualLoss(nn.Module):
    """Distance of several layers of a frozen network between the predicted and the true image.

    The mean over the layers of 1 - spatial cosine: as in LPIPS (Zhang et al. 2018, Eq. 1), features
    are normalised at each position, which makes layers and networks comparable. Beside the loss of
    a diffusion model that predicts images it buys sharpness for little training (Ma et al. 2026,
    "PixelGen", arXiv 2602.02493); with the last layer of the inverted backbone alone it is the
    consistency feedback of ControlNet++ (Li et al. 2024, Eq. 8).

    At high noise the predicted image is the mean of many, whose features mean little: the loss at
    timestep t is weighted by alphas_cumprod[t] ** signal_power, and 0 where alphas_cumprod[t] is
    below `min_signal`, which saves the network's time.

    Args:
        network: The frozen network that compares; `None`: the backbone that is inverted.
        layers: Names of its layers; `None`: its last one.
        weight: Of this loss beside the diffusion loss.
        signal_power: Exponent of the weight by timestep; 0 weights all alike.
        min_signal: Least alphas_cumprod of images that are compared. Above 0, finding these
            images lets a GPU wait once a step.
        image_size: Side in pixels of what the network sees; `None`: its own.
        transforms: Random transformations, the same for both images: without them, training
            exploits pixel patterns of this one network.

    Raises:
        InputError: A weight that is not above 0, a signal outside [0, 1), or an unknown layer.
    """

    def __init__(
        self,
        network: Backbone | None = None,
        layers: Sequence[str] | None = None,
        weight: float = 1.0,
        signal_power: float = 1.0,
        min_signal: float = 0.0,
        image_size: int | None = None,
        transforms: Sequence[Transform] = (),
    ) -> None:
        super().__init__()
        if not weight > 0:
            raise InputError(
                f"model.perceptual.weight is {weight}, expected above 0; model.perceptual=null "
                "trains without."
            )
        if not 0 <= min_signal < 1:
            raise InputError(
                f"model.perceptual.min_signal is {min_signal}, expected from 0 to below 1."
            )
        self.network = network
        self.layers = ("last",) if layers is None else tuple(layers)
        self.weight, self.signal_power, self.min_signal = weight, signal_power, min_signal
        self.image_size = image_size
        self.transforms = tuple(transforms)

    def forward(
        self,
        backbone: Backbone,
        predicted: Tensor,
        images: Tensor,
        alphas_cumprod: Tensor,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Return the weighted loss of each image, shape (B,).

        Args:
            backbone: The backbone that is inverted, which compares if there is no `network`.
            predicted: Predicted images, shape (B, 3, H, W), in about [-1, 1].
            images: True images, same shape, in [-1, 1].
            alphas_cumprod: Of the timesteps where the prediction was made, shape (B,).
            generators: One for each image, for the transformations.
        """
        weights = self.weight * alphas_cumprod**self.signal_power
        shown = None  # rows that are compared; all of them
        if self.min_signal > 0:
            shown = (alphas_cumprod >= self.min_signal).nonzero()[:, 0]
            if not len(shown):
                return torch.zeros_like(weights)
            generators = [generators[row] for row in shown.tolist()]
            predicted, images = predicted[shown], images[shown]
            alphas_cumprod = alphas_cumprod[shown]
        both = torch.cat([predicted, images], dim=1)  # so that both are transformed alike
        noise_level = (1 - alphas_cumprod).sqrt()
        predicted, images = transform_all(self.transforms, both, noise_level, generators).chunk(
            2, 1
        )
        network = backbone if self.network is None else self.network
        with torch.no_grad():
            expected = self._see(network, images)
        seen = self._see(network, predicted)
        distances = [1 - spatial_cosine(seen[layer], expected[layer]) for layer in seen]
        distance = torch.stack(distances).mean(dim=0)
        if shown is not None:
            distance = torch.zeros_like(weights).index_put((shown,), distance)
        return weights * distance

    def _see(self, network: Backbone, images: Tensor) -> dict[str, Tensor]:
        view = network.normalize(resize(images, self.image_size or network.image_size))
        return network.maps(self.layers, view, norm=False)[0]


def alignment_loss(unet: UNet2DConditionModel, encoded: Tensor, z_0: Tensor) -> Tensor:
    """Distance of encoded features to what the UNet's first convolution gives of clean latents.

    It teaches the feature encoder to draw the image in the UNet's own terms, so that the ControlNet
    finds an image in the features long before it would by the diffusion loss alone.

    Args:
        unet: Its first convolution is the target's; no gradient goes into it.
        encoded: From a `FeatureEncoder`, shape (B, C, h, w).
        z_0: Clean latents, shape (B, c, h, w).

    Returns:
        Mean squared error of each image, shape (B,).
    """
    with torch.no_grad():
        target = unet.conv_in(z_0.to(unet.dtype)).float()
    return (encoded.float() - target).square().mean(dim=(1, 2, 3))
