import shutil

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from featinv import FeatInv
from featinv.checkpoints import build_model, save_model
from featinv.interop.stable_diffusion import load_prompts, load_unet, load_vae
from featinv.utils.errors import InputError

PROMPT = "a high-quality, detailed, and professional image"


@pytest.fixture
def model(stable_diffusion_config, wake) -> FeatInv:
    """A model on the narrow Stable Diffusion whose output depends on the features."""
    torch.manual_seed(0)
    return wake(build_model(stable_diffusion_config)).eval()


# The parts


def test_the_prompts_are_encoded_as_stable_diffusion_does(stable_diffusion):
    prompts = load_prompts(str(stable_diffusion))
    tokenizer = CLIPTokenizer.from_pretrained(stable_diffusion / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(stable_diffusion / "text_encoder").eval()
    for text, keep in ((PROMPT, True), ("", False)):
        tokens = tokenizer(text).input_ids
        padded = tokens + [tokenizer.eos_token_id] * (77 - len(tokens))
        expected = encoder(torch.tensor([padded])).last_hidden_state
        torch.testing.assert_close(prompts(torch.tensor([keep])), expected)
    both = prompts(torch.tensor([False, True, False]))
    assert both.shape == (3, 77, 32)
    assert torch.equal(both[0], both[2]) and not torch.allclose(both[0], both[1])


def test_saved_prompts_need_no_text_encoder(stable_diffusion, tmp_path):
    prompts = load_prompts(str(stable_diffusion), "a cat")
    prompts.save(tmp_path)
    again = load_prompts(str(tmp_path), "a cat")
    assert torch.equal(again.embeddings, prompts.embeddings) and again.prompt == "a cat"
    with pytest.raises(InputError, match="The prompt is 'a dog', but .* only 'a cat'"):
        load_prompts(str(tmp_path), "a dog")


@pytest.mark.parametrize(
    ("load", "part"), [(load_unet, "unet"), (load_vae, "vae"), (load_prompts, "text_encoder")]
)
def test_a_damaged_or_incomplete_folder_is_an_error(stable_diffusion, tmp_path, load, part):
    folder = shutil.copytree(stable_diffusion, tmp_path / "sd")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    sentence = f"Stable Diffusion's {part} cannot be loaded: the folder"
    with pytest.raises(InputError, match=sentence):
        load(str(folder))
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=sentence):
        load(str(folder))


def test_a_missing_tokenizer_is_an_error(stable_diffusion, tmp_path):
    folder = shutil.copytree(stable_diffusion, tmp_path / "sd")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(InputError, match="tokenizer"):
        load_prompts(str(folder))


# In a model


def test_the_prompt_is_dropped_together_with_the_features(model, images, monkeypatch):
    features, contexts = [], []
    predict = model.predict
    model.feature_encoder[0].register_forward_pre_hook(lambda _, args: features.append(args[0]))

    def spy(z_t, timesteps, context, encoded):
        contexts.append(context)
        return predict(z_t, timesteps, context, encoded)

    monkeypatch.setattr(model, "predict", spy)
    keep = torch.tensor([True, False, True])
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    model.losses(images, torch.tensor([5, 500, 900]), keep, generators)
    assert torch.equal(contexts[0], model.prompts(keep))
    assert torch.equal(features[0].flatten(1).any(1), keep)


@pytest.mark.parametrize("guidance", ["features", "text"])
@torch.no_grad()
def test_guidance_leads_away_from_features_or_from_the_prompt_only(model, images, guidance):
    features = model.backbone.features(images)
    dropped = features if guidance == "text" else torch.zeros_like(features)
    noise, timestep = torch.randn(3, 4, 4, 4), torch.full((3,), 999)
    keep = torch.ones(3, dtype=torch.bool)

    def naive(z_t):
        kept = model.denoise(z_t, timestep, model.prompts(keep), features)
        without = model.denoise(z_t, timestep, model.prompts(~keep), dropped)
        return without + 1.5 * (kept - without)

    seen = []

    class Scheduler:
        init_noise_sigma, timesteps = 1, [999]

        def scale_model_input(self, z_t, timestep):
            return z_t

        def step(self, prediction, timestep, z_t):
            seen.append((z_t, prediction))
            return type("Step", (), {"prev_sample": noise})

    sampler = model.sampler.override(guidance=guidance)
    object.__setattr__(sampler, "make_scheduler", lambda diffusion: Scheduler())
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    model.draw(features, model.backbone.layer, sampler, generators)
    ((z_t, prediction),) = seen
    torch.testing.assert_close(prediction, naive(z_t), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_saved_model_finds_its_stable_diffusion(model, images, tmp_path, stable_diffusion):
    save_model(model, tmp_path / "model.safetensors")
    features = model.backbone.features(images)
    assert torch.equal(FeatInv.load(tmp_path).invert(features), model.invert(features))


def test_another_prompt_is_detected(model, tmp_path):
    model.config["prompts"]["prompt"] = "another"
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="trained with another prompts"):
        FeatInv.load(tmp_path)


def test_no_gradient_is_dead_and_none_is_wasted(model, images):
    """Every trained parameter gets a gradient, no frozen one does (349 million of the original's
    trainable parameters got none, and 510 million frozen ones did)."""
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    keep, timesteps = torch.ones(3, dtype=torch.bool), torch.tensor([5, 500, 900])
    model.train().losses(images, timesteps, keep, generators).mean().backward()
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == name.startswith(("controlnet.", "feature_encoder.")), name


# A frozen UNet in bfloat16


def test_a_unet_in_bfloat16(stable_diffusion_config, wake, images):
    torch.manual_seed(0)
    exact = wake(build_model(stable_diffusion_config)).eval()
    stable_diffusion_config["unet"]["dtype"] = "bfloat16"
    torch.manual_seed(0)
    model = wake(build_model(stable_diffusion_config)).eval()
    assert model.unet.dtype == torch.bfloat16
    assert {p.dtype for p in model.trained().parameters()} == {torch.float32}
    features = model.backbone.features(images)
    drawn, expected = model.invert(features), exact.invert(features)
    assert drawn.dtype == torch.float32
    assert 0 < (drawn - expected).abs().mean() < 0.02
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    keep, timesteps = torch.ones(3, dtype=torch.bool), torch.tensor([5, 500, 900])
    loss = model.losses(images, timesteps, keep, generators)
    loss.mean().backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.controlnet.parameters())


# Parts that do not fit


def test_a_unet_that_reads_prompts_needs_some(stable_diffusion_config, images):
    del stable_diffusion_config["prompts"]
    model = build_model(stable_diffusion_config)
    with pytest.raises(InputError, match="The UNet reads a prompt, but the model was made without"):
        model.invert(model.backbone.features(images))


def test_prompts_of_another_width(stable_diffusion_config, tiny_config):
    prompts = {"_target_": "featinv.interop.stable_diffusion.Prompts", "dim": 48}
    for config, width in ((stable_diffusion_config, 32), (tiny_config, 0)):
        expected = f"embeddings have 48 channels, but the UNet reads {width}"
        with pytest.raises(InputError, match=expected):
            build_model(config | {"prompts": prompts})


def test_guidance_by_text_without_prompts(tiny_model, tiny_config):
    features = torch.zeros(1, *tiny_model.backbone.feature_shape)
    with pytest.raises(InputError, match="sampler.guidance is text, but the UNet reads no prompt"):
        tiny_model.invert(features, guidance="text")
    tiny_config["sampler"]["guidance"] = "text"
    with pytest.raises(InputError, match="sampler.guidance is text, but the UNet reads no prompt"):
        build_model(tiny_config)
