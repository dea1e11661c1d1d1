"""Codecs: pixels in [-1, 1] to latents and back."""

from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from featinv.utils.errors import InputError, multiple_of
from featinv.utils.seeding import randn
from featinv.utils.tensor_files import read_tensors, save_tensors

PATCH_PCA = files("featinv") / "assets" / "patch_pca_8.safetensors"


class PatchPCA(nn.Module):
    """A linear codec: the leading principal components of square image patches.

    Natural images put most of their energy into few components, so 24 of the 192 numbers of an
    8x8 colour patch keep what a small diffusion model can draw, at a 16th of the positions.
    The basis is fixed: it is not trained with the model and ships with the package. It computes in
    float32, whatever autocast says: rounded latents would add up over the steps of a sampler.

    Coefficients are divided by the root of their standard deviation, halfway between equal weight
    of all components in the diffusion loss and their own variance: large structures lead and
    details still count. Then all are scaled alike, to a mean variance of 1.

    Args:
        num_components: How many leading components are kept: the channels of the latents.
        basis: A `.safetensors` file written by `save`; `None` takes the shipped one.

    Raises:
        InputError: More components than the basis holds, or no such basis.
    """

    def __init__(self, num_components: int = 24, basis: str | None = None) -> None:
        super().__init__()
        names = ("mean", "components", "std")
        tensors = read_tensors(basis or str(PATCH_PCA), "codec's basis", "PatchPCA.save", names)
        available = len(tensors["components"])
        if not 1 <= num_components <= available:
            raise InputError(
                f"The codec's number of components is {num_components}, "
                f"expected 1 to {available} with this basis."
            )
        std = tensors["std"][:num_components].double()
        scale = std.sqrt()
        scale = (scale * (std / scale).square().mean().sqrt()).float()  # mean latent variance 1
        self.register_buffer("mean", tensors["mean"])  # (3, p, p)
        self.register_buffer("components", tensors["components"][:num_components])
        self.register_buffer("scale", scale.view(-1, 1, 1, 1))
        self.patch_size = self.mean.shape[-1]
        self.latent_channels = num_components

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents of square images.

        Raises:
            InputError: The patch size does not divide their side.
        """
        multiple_of("The image size", image_size, self.patch_size, "the codec's patch size")
        return self.latent_channels, image_size // self.patch_size, image_size // self.patch_size

    def encode(self, images: Tensor, generators: list[torch.Generator] | None = None) -> Tensor:
        """Project images onto the components.

        Args:
            images: Shape (B, 3, H, W) in [-1, 1]; H and W multiples of the patch size p.
            generators: Not used: the code is deterministic.

        Returns:
            Latents, shape (B, num_components, H / p, W / p), mean 0 and mean variance about 1.
        """
        p = self.patch_size
        mean = self.mean.repeat(1, images.shape[-2] // p, images.shape[-1] // p)
        with _full_precision(images.device):
            return F.conv2d(images.to(mean) - mean, self.components / self.scale, stride=p)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images, shape (B, 3, p * h, p * w), of latents (B, num_components, h, w).

        The values are in about [-1, 1] and are not clamped.
        """
        basis, p = self.components * self.scale, self.patch_size
        with _full_precision(latents.device):
            images = F.conv_transpose2d(latents.to(basis), basis, stride=p)
        return images + self.mean.repeat(1, latents.shape[-2], latents.shape[-1])

    @staticmethod
    def fit(images: Tensor, patch_size: int = 8, num_components: int = 64) -> dict[str, Tensor]:
        """Find the leading principal components of all patches of images (N, 3, H, W) in [-1, 1].

        Returns:
            A basis to `save`: `mean` (3, p, p), `components` (num_components, 3, p, p) of unit
            norm, and `std` (num_components,).
        """
        patches = F.unfold(images, patch_size, stride=patch_size)  # (N, 3 p p, L)
        patches = patches.transpose(1, 2).flatten(0, 1).double()  # (N L, 3 p p)
        mean = patches.mean(0)
        covariance = torch.cov(patches.T)
        variance, vectors = torch.linalg.eigh(covariance)  # ascending
        shape = (3, patch_size, patch_size)
        return {
            "mean": mean.view(shape).float(),
            "components": vectors.flip(1).T[:num_components].reshape(-1, *shape).float(),
            "std": variance.flip(0)[:num_components].clamp(min=0).sqrt().float(),
        }

    @staticmethod
    def save(basis: dict[str, Tensor], path: str | Path) -> None:
        """Write a basis made by `fit`."""
        save_tensors(path, basis)


class StableDiffusionVAE(nn.Module):
    """The autoencoder of latent diffusion (Rombach et al. 2022).

    Args:
        vae: Of diffusers; its `scaling_factor` (0.18215 in Stable Diffusion 1) brings the latents
            to a variance of about 1.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents of square images.

        Raises:
            InputError: The downsampling factor does not divide their side.
        """
        multiple_of("The image size", image_size, self.factor, "the VAE's downsampling factor")
        channels = self.vae.config.latent_channels
        return channels, image_size // self.factor, image_size // self.factor

    def encode(self, images: Tensor, generators: list[torch.Generator] | None = None) -> Tensor:
        """Draw latents from the posterior q(z | image).

        Args:
            images: Shape (B, 3, H, W) in [-1, 1]; H and W multiples of 8.
            generators: One for each image; `None` takes the posterior's mean.

        Returns:
            Latents, shape (B, 4, H / 8, W / 8), with a variance of about 1.
        """
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean
        if generators is not None:
            noise = randn(latents.shape[1:], generators).to(latents, non_blocking=True)
            latents = latents + posterior.std * noise
        return latents * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images, shape (B, 3, 8 h, 8 w), in about [-1, 1], of latents (B, 4, h, w)."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Switch autocast off, on devices that have it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
