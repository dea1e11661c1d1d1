import os
import pickle
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from featinv.codecs import StableDiffusionVAE
from featinv.guidance import classifier_free_guidance
from featinv.interop.official import AbsentBackbone, convert, import_original
from featinv.models.featinv import FeatInv
from featinv.sampling import SamplerConfig, sample
from featinv.utils.errors import InputError

PARITY = Path(__file__).parents[1] / "parity"
CHECKPOINT = PARITY / "official_layout.ckpt"
TOLERANCE = 5e-5  # largest absolute difference, float32 on a CPU


@pytest.fixture(scope="module")
def original() -> FeatInv:
    """The original's narrow copy, imported."""
    return import_original(CHECKPOINT, num_attention_heads=8)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Inputs and outputs of the original's code."""
    return load_file(PARITY / "expected.safetensors")


@pytest.fixture
def state() -> dict[str, Tensor]:
    """The original's state dict; free to edit."""
    return torch.load(CHECKPOINT, weights_only=True)


def outputs(model: FeatInv, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute every output that was recorded from the original."""
    z_t, timesteps, context, features = (
        given[name] for name in ("latents", "timesteps", "context", "features")
    )
    posterior = model.codec.vae.encode(given["image"]).latent_dist
    return {
        "alphas_cumprod": model.diffusion.alphas_cumprod,
        "eps": model.denoise(z_t, timesteps, context, features),
        "eps_without_control": model.unet(z_t, timesteps, context).sample,
        "eps_with_zero_features": model.denoise(
            z_t, timesteps, context, torch.zeros_like(features)
        ),
        "encoded_features": model.feature_encoder(features, "last"),
        "ddim_latents": ddim(model, given),
        "vae_mean": posterior.mean,
        "vae_logvar": posterior.logvar,
        "vae_decoded": model.codec.decode(given["vae_latents"]),
    }


def ddim(model: FeatInv, given: dict[str, Tensor]) -> Tensor:
    """Sample as the original does: guidance drops the prompt only and keeps the features."""
    context, uncond, features = given["context"], given["uncond_context"], given["features"]

    def denoiser(context, features):
        return lambda z_t, timesteps: model.denoise(z_t, timesteps, context, features)

    denoise = classifier_free_guidance(
        denoiser(context, features),
        denoiser(uncond, features),
        denoiser(torch.cat([context, uncond]), torch.cat([features, features])),
        model.sampler.guidance_scale,
    )
    scheduler = model.sampler.override(num_steps=5).make_scheduler(model.diffusion)
    assert scheduler.timesteps.tolist() == given["ddim_timesteps"].flip(0).tolist()
    return sample(denoise, given["latents"], scheduler)


@torch.no_grad()
def test_every_output_of_the_original_is_reproduced(original, expected):
    computed = outputs(original, expected)
    inputs = {"latents", "timesteps", "context", "uncond_context", "features", "image"}
    inputs |= {"vae_latents"}
    settings = {"ddim_timesteps", "guidance_scale"}
    assert computed.keys() == expected.keys() - inputs - settings
    for name, value in computed.items():
        error = (value - expected[name]).abs().max().item()
        print(f"{name}: largest error {error:.1e}")
        assert error < TOLERANCE, name


def test_the_model_has_the_originals_settings(original, expected):
    assert original.sampler == SamplerConfig(
        "ddim", num_steps=50, guidance_scale=1.75, guidance="text"
    )
    assert original.sampler.guidance_scale == expected["guidance_scale"].item()
    assert original.diffusion.prediction_type == "epsilon"
    assert (original.image_size, original.latent_shape) == (256, (4, 32, 32))
    assert original.conditioning == "spatial" and not original.train_unet
    assert isinstance(original.codec, StableDiffusionVAE) and not original.training
    trained = {name for name, p in original.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in original.trained().named_parameters()}
    assert {name.split(".")[0] for name in trained} == {"controlnet", "feature_encoder"}
    assert all(p.dtype == torch.float32 for p in original.parameters())


@torch.no_grad()
def test_every_file_format_gives_the_same_model(original, state, tmp_path):
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "lightning.ckpt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()},
        tmp_path / "plain.safetensors",
    )
    for name in ("lightning.ckpt", "old.pth", "plain.safetensors"):
        other = import_original(tmp_path / name, num_attention_heads=8)
        for ours, theirs in zip(original.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def full_size(key: str, size: int) -> int:
    """Return a dimension of the original's full-size model for one of its narrow copy."""
    if "input_hint_block" in key and size == 512:
        return 512
    factor = 4 if key.startswith("first_stage_model.") else 10
    return {48: 768, 24: 1024}.get(size, size if size % 32 else size * factor)


def test_the_full_size_model_has_the_originals_parameter_counts(state):
    with torch.device("meta"):  # shapes without memory
        wide = {
            key: torch.empty([full_size(key, size) for size in value.shape])
            for key, value in state.items()
            if "." in key  # the noise schedule's tables have no dot
        }
        model = convert(wide, num_attention_heads=8)
    parts = (model.unet, model.controlnet, model.feature_encoder, model.codec)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [859_520_964, 368_746_432 - 8_553_792, 8_553_792, 83_653_863]


def test_a_backbone_is_optional_but_must_fit(original, tiny_model):
    assert isinstance(original.backbone, AbsentBackbone)
    assert original.backbone.feature_shape == (24, 9, 9)
    with pytest.raises(InputError, match="without a backbone.*convnext_base"):
        original.backbone.features(torch.zeros(1, 3, 256, 256))
    with pytest.raises(InputError, match="'resnet10t' gives features of 512 channels.* 24"):
        import_original(CHECKPOINT, num_attention_heads=8, backbone=tiny_model.backbone)
    tiny_model.backbone.feature_shapes[tiny_model.backbone.layer] = (24, 9, 9)
    model = import_original(CHECKPOINT, num_attention_heads=8, backbone=tiny_model.backbone)
    assert model.backbone is tiny_model.backbone


@pytest.mark.parametrize("heads", [0, 7])
def test_heads_must_divide_the_channels(heads):
    with pytest.raises(InputError, match=rf"is {heads}, .*32, 64, 128, 128; .* has 8"):
        import_original(CHECKPOINT, num_attention_heads=heads)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", "no tensor '{key}'"),
        ("control_model.zero_convs.11.0.weight", "controlnet_down_blocks.11.weight"),
        ("first_stage_model.quant_conv.weight", "quant_conv.weight"),
    ],
)
def test_a_missing_tensor_is_named(key, sentence, state, tmp_path):
    del state[key]
    torch.save(state, tmp_path / "less.ckpt")
    with pytest.raises(InputError, match=sentence.format(key=key)):
        import_original(tmp_path / "less.ckpt", num_attention_heads=8)


def test_an_extra_tensor_or_a_wrong_shape_is_named(state):
    with pytest.raises(InputError, match="1 tensors that have no place.*control_model.extra"):
        convert({**state, "control_model.extra": torch.zeros(1)}, 8)
    state["control_model.middle_block_out.0.bias"] = torch.zeros(64)
    with pytest.raises(InputError, match=r"controlnet_mid_block.bias: .*\[64\].*\[128\]"):
        convert(state, 8)


def test_another_noise_schedule_is_an_error(state):
    state["alphas_cumprod"] = state["alphas_cumprod"].square()
    with pytest.raises(InputError, match=r"has 1000 steps and ends at .*, expected .* 0\.00466"):
        convert(state, 8)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        import_original(tmp_path / "none.ckpt", num_attention_heads=8)


def test_a_file_of_something_else_is_an_error(tmp_path):
    torch.save({"state_dict": {"controlnet.conv_in.weight": 0}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="other.ckpt' is not one of the original FeatInv code"):
        import_original(tmp_path / "other.ckpt", num_attention_heads=8)


@pytest.mark.parametrize("name", ["broken.ckpt", "broken.safetensors"])
def test_a_damaged_file_is_an_error(name, tmp_path):
    whole = tmp_path / "whole.ckpt"
    torch.save({"weight": torch.zeros(1000)}, whole)
    for content in (b"", whole.read_bytes()[:-500], Random(0).randbytes(1000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}' cannot be read"):
            import_original(tmp_path / name, num_attention_heads=8)


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o))])
def test_a_file_cannot_run_code(save, tmp_path):
    save({"state_dict": Touch(tmp_path / "harm")}, tmp_path / "trap.ckpt")
    with pytest.raises(InputError, match="trap.ckpt' cannot be read"):
        import_original(tmp_path / "trap.ckpt", num_attention_heads=8)
    assert not (tmp_path / "harm").exists()
