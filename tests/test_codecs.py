import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from sklearn.decomposition import PCA

from featinv.codecs import PatchPCA, StableDiffusionVAE
from featinv.utils.errors import InputError


@pytest.fixture
def pictures() -> torch.Tensor:
    """Smooth random pictures, shape (12, 3, 32, 24), not square."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(12, 3, 6, 5, generator=generator)
    fine = torch.randn(12, 3, 32, 24, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (32, 24), mode="bilinear")
    return (smooth + 0.1 * fine).tanh()


def to_patches(images: torch.Tensor, size: int) -> np.ndarray:
    """Cut images into flat patches by two loops, row by row."""
    _, _, height, width = images.shape
    return np.stack(
        [
            image[:, y : y + size, x : x + size].reshape(-1).numpy()
            for image in images
            for y in range(0, height, size)
            for x in range(0, width, size)
        ]
    )


def fitted(pictures: torch.Tensor, tmp_path, **options) -> PatchPCA:
    path = tmp_path / "basis.safetensors"
    PatchPCA.save(PatchPCA.fit(pictures, patch_size=4, num_components=20), path)
    return PatchPCA(basis=str(path), **options)


def test_encode_inverts_decode():
    codec = PatchPCA(24)
    latents = torch.randn(2, 24, 3, 5)
    images = codec.decode(latents)
    assert images.shape == (2, 3, 24, 40)
    torch.testing.assert_close(codec.encode(images), latents, atol=1e-4, rtol=1e-4)


def test_the_code_is_that_of_sklearns_pca(pictures, tmp_path):
    codec = fitted(pictures, tmp_path, num_components=7)
    pca = PCA(7, svd_solver="full").fit(to_patches(pictures, 4))
    coefficients = pca.transform(to_patches(pictures, 4))  # (N L, 7)
    variance = pca.explained_variance_

    # latent = coefficient / std**0.5, all divided by one number that makes the mean variance 1
    expected = coefficients / variance**0.25
    expected /= np.sqrt(np.mean(variance / variance**0.5))
    latents = codec.encode(pictures)  # (12, 7, 8, 6)
    assert latents.shape == (12, 7, 8, 6)
    ours = latents.permute(0, 2, 3, 1).reshape(-1, 7).numpy()
    signs = np.sign((ours * expected).sum(0))  # an eigenvector's sign is arbitrary
    np.testing.assert_allclose(ours, expected * signs, atol=1e-3)

    reconstruction = to_patches(codec.decode(latents), 4)
    np.testing.assert_allclose(reconstruction, pca.inverse_transform(coefficients), atol=1e-4)


def test_a_basis_that_cannot_be_used(tmp_path):
    (tmp_path / "text.safetensors").write_text("no basis")
    for name in ("text", "nowhere"):
        with pytest.raises(InputError, match=name):
            PatchPCA(4, basis=str(tmp_path / f"{name}.safetensors"))
    for num_components in (0, 65):
        with pytest.raises(InputError, match=rf"is {num_components}, expected 1 to 64"):
            PatchPCA(num_components)


@pytest.fixture
def vae() -> StableDiffusionVAE:
    """A narrow random VAE of Stable Diffusion's kind: 32 px to latents 4 x 8 x 8."""
    torch.manual_seed(0)
    return StableDiffusionVAE(
        AutoencoderKL(
            block_out_channels=[8, 8, 8],
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            latent_channels=4,
            norm_num_groups=4,
        )
    )


def test_the_vae_draws_each_image_with_its_own_generator(vae, images):
    def draw(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return vae.encode(images[rows], generators)

    together = draw([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(draw([row])[0], together[row], atol=1e-5, rtol=0)
    posterior = vae.vae.encode(images).latent_dist
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = 0.18215 * (posterior.mean[1] + (0.5 * posterior.logvar[1]).exp() * noise)
    torch.testing.assert_close(together[1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.encode(images), 0.18215 * posterior.mean)


def test_the_vae_lets_gradients_through(vae):
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    vae.decode(latents).sum().backward()
    assert latents.grad.abs().sum() > 0


def test_latent_shape_is_what_encode_gives_and_refuses_other_sizes(vae):
    for codec, side in ((PatchPCA(4), 8), (vae, 4)):
        shape = codec.encode(torch.zeros(1, 3, 48, 48)).shape[1:]
        assert codec.latent_shape(48) == tuple(shape) == (4, 48 // side, 48 // side)
        for size, nearest in ((47, 48), (-8, side)):
            with pytest.raises(InputError, match=rf"is {size}, .*for example {nearest}\."):
                codec.latent_shape(size)
