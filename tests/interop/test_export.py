import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from featinv import FeatInv
from featinv.checkpoints import build_model, save_model
from featinv.cli.convert import main
from featinv.interop.official import import_original
from featinv.models.base import state_hash

PARITY = Path(__file__).parents[1] / "parity"
CHECKPOINT = PARITY / "official_layout.ckpt"


@pytest.fixture
def stable_diffusion_model(stable_diffusion_config, wake) -> FeatInv:
    return wake(build_model(stable_diffusion_config)).eval()


def exported(model: FeatInv, folder: Path) -> Path:
    save_model(model, folder / "model.safetensors")
    main(["export", str(folder), str(folder / "out")])
    return folder / "out"


@torch.no_grad()
def prediction_of_readme(folder: Path, *given) -> torch.Tensor:
    """Run the README's lines, as a reader would."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names["predict"](*given)


# Export


@torch.no_grad()
def test_an_exported_model_predicts_the_same_bit_for_bit(stable_diffusion_model, images, tmp_path):
    model = stable_diffusion_model
    folder = exported(model, tmp_path)
    z_t, timesteps = torch.randn(3, 4, 4, 4), torch.tensor([5, 500, 900])
    features = model.backbone.features(images)
    context = load_file(folder / "prompts.safetensors")["embeddings"][:1].expand(3, -1, -1)
    expected = model.denoise(z_t, timesteps, model.context(torch.ones(3, dtype=bool)), features)
    assert torch.equal(prediction_of_readme(folder, z_t, timesteps, features, context), expected)
    without = model.denoise(z_t, timesteps, context, torch.zeros_like(features))
    assert not torch.allclose(without, expected, atol=1e-3)  # the features matter


@pytest.mark.parametrize("layer", ["last", "layer1"])  # 2 x 2, and 16 x 16: folded to 4 x 4
@torch.no_grad()
def test_an_exported_small_model_predicts_the_same(layer, tiny_config, wake, images, tmp_path):
    tiny_config["backbone"]["layer"] = layer
    model = wake(build_model(tiny_config | {"fold_features": True})).eval()
    assert model.feature_encoder[0].fold == (4 if layer == "layer1" else 1)
    folder = exported(model, tmp_path)
    z_t, timesteps = torch.randn(3, *model.latent_shape), torch.tensor([5, 500, 900])
    features = model.backbone.features(images)
    expected = model.denoise(z_t, timesteps, features=features)
    assert torch.equal(prediction_of_readme(folder, z_t, timesteps, features, None), expected)
    codec = load_file(folder / "codec.safetensors")
    assert torch.equal(codec["components"], model.codec.components)
    assert "Average the features" not in (folder / "README.md").read_text()


@torch.no_grad()
def test_the_readme_of_a_pooled_model_says_that_features_are_pooled(tiny_config, images, tmp_path):
    folder = exported(build_model(tiny_config | {"conditioning": "pooled"}), tmp_path)
    assert "Average the features over their positions" in (folder / "README.md").read_text()


def test_the_folder_holds_what_diffusers_loads(stable_diffusion_model, tmp_path):
    folder = exported(stable_diffusion_model, tmp_path)
    found = {path.name for path in folder.iterdir()}
    assert found == {
        "README.md",
        "controlnet",
        "feature_conv.safetensors",
        "prompts.safetensors",
        "scheduler",
        "unet",
        "vae",
    }
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        loaded = kind.from_pretrained(folder / part).state_dict()
        ours = stable_diffusion_model.unet if part == "unet" else stable_diffusion_model.codec.vae
        torch.testing.assert_close(loaded, ours.state_dict(), rtol=0, atol=0)
    ControlNetModel.from_pretrained(folder / "controlnet")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    diffusion = stable_diffusion_model.diffusion
    assert torch.equal(scheduler.alphas_cumprod, diffusion.alphas_cumprod)
    assert scheduler.config.prediction_type == diffusion.prediction_type


def test_priors_are_not_exported_and_nothing_is_overwritten(
    awake_model, tiny_config, tmp_path, capsys
):
    save_model(build_model({**tiny_config, "conditioning": "none"}), tmp_path / "prior.safetensors")
    with pytest.raises(SystemExit, match="^2$"):
        main(["export", str(tmp_path / "prior.safetensors"), str(tmp_path / "out")])
    assert "is a prior without a ControlNet: expected a run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    exported(awake_model, tmp_path)
    with pytest.raises(SystemExit, match="^2$"):
        main(["export", str(tmp_path), str(tmp_path / "out")])
    assert "is in use: expected a new or empty folder." in capsys.readouterr().err


def test_models_without_a_unet_are_not_exported(tiny_config, tmp_path, capsys):
    shared = {key: tiny_config[key] for key in ("backbone", "image_size")}
    decoder = build_model(shared | {"_target_": "featinv.models.Decoder"})
    save_model(decoder, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="^2$"):
        main(["export", str(tmp_path), str(tmp_path / "out")])
    assert "holds a Decoder, expected a FeatInv" in capsys.readouterr().err


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(["exprot"])
    assert "invalid choice: 'exprot'" in capsys.readouterr().err


# Import


def test_an_imported_folder_holds_the_imported_model(tmp_path):
    main(["import", str(CHECKPOINT), str(tmp_path / "a")])
    (tmp_path / "a").rename(tmp_path / "b")  # a folder may move
    model = FeatInv.load(tmp_path / "b")
    direct = import_original(CHECKPOINT, num_attention_heads=8)
    assert state_hash(model) == state_hash(direct)
    assert model.sampler == direct.sampler
    assert model.frozen_hashes() == direct.frozen_hashes()


@torch.no_grad()
def test_an_imported_model_with_prompts_inverts_features(stable_diffusion, tmp_path):
    context_dim = load_file(PARITY / "expected.safetensors")["context"].shape[2]
    folder = text_encoder_of_width(stable_diffusion, tmp_path / "sd", context_dim)
    options = ["--stable-diffusion", str(folder), "--num-attention-heads", "8"]
    main(["import", str(CHECKPOINT), str(tmp_path / "out"), *options])
    model = FeatInv.load(tmp_path / "out")
    features = load_file(PARITY / "expected.safetensors")["features"][:1]
    assert model.invert(features, num_steps=1).shape == (1, 1, 3, 256, 256)


def text_encoder_of_width(source: Path, folder: Path, width: int) -> Path:
    """Return a copy of a Stable Diffusion folder with a text encoder of another width."""
    shutil.copytree(source, folder)
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.hidden_size = width
    shutil.rmtree(folder / "text_encoder")
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder
