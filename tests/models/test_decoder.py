import json

import pytest
import torch
from helpers import TINY_RUN, run

import evaluate
from featinv import InputError
from featinv.checkpoints import build_model, load_prior, save_model
from featinv.models.decoder import Decoder
from featinv.utils.pixels import resize

DECODER = [
    *(o for o in TINY_RUN if not o.startswith(("model.codec", "model.hidden", "sampler"))),
    "model=decoder",
    "model.channels=32",
]


@pytest.fixture
def config(tiny_config) -> dict:
    keys = ("backbone", "optimizer", "lr_schedule", "warmup_steps", "seed")
    shared = {key: tiny_config[key] for key in keys}
    target = "featinv.models.Decoder"
    return shared | {"_target_": target, "image_size": 32, "channels": 16}


@pytest.fixture
def decoder(config) -> Decoder:
    torch.manual_seed(0)
    return build_model(config)


@pytest.mark.parametrize("image_size", [8, 64])
def test_images_have_the_size_asked_for(config, image_size):
    decoder = build_model({**config, "image_size": image_size})
    features = torch.randn(2, *decoder.backbone.feature_shape)
    drawn = decoder.invert(features, num_samples=3)
    assert drawn.shape == (2, 3, 3, image_size, image_size)
    assert drawn.abs().max() <= 1
    assert torch.equal(drawn[:, 0], drawn[:, 2]), "there is nothing to sample"


def test_the_loss_is_the_squared_error_in_pixels(decoder, images):
    big = torch.nn.functional.interpolate(images, (64, 64), mode="bicubic").clamp(-1, 1)
    drawn = decoder._decode(decoder.backbone.features(big))
    for i in range(3):
        error = (drawn[i] - resize(big, 32)[i]).square().sum() / (3 * 32 * 32)
        torch.testing.assert_close(decoder.losses(big)[i], error, rtol=1e-4, atol=1e-6)


def test_a_pooled_decoder_does_not_see_where_things_are(config):
    decoder = build_model({**config, "conditioning": "pooled"})
    features = torch.randn(2, *decoder.backbone.feature_shape)
    torch.testing.assert_close(decoder.invert(features), decoder.invert(features.flip(3)))


def test_it_learns_to_reconstruct(decoder, images):
    optimizer = torch.optim.Adam(decoder.trained().parameters(), 3e-3)
    first = decoder.losses(images).mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = decoder.losses(images).mean()
        loss.backward()
        optimizer.step()
    assert all(p.grad is None for p in decoder.backbone.parameters())
    assert loss.item() < 0.4 * first


def test_it_is_trained_resumed_and_evaluated_as_a_featinv_is(tmp_path):
    output = tmp_path / "run"
    run("train", *DECODER, "trainer.precision=32-true", f"output={output}")
    run("train", f"resume={output}", "trainer.max_steps=3")
    assert isinstance(Decoder.load(output), Decoder)
    other = tmp_path / "evaluated"
    overrides = [f"checkpoint={output}", "data=photos", "data.crops_per_photo=1"]
    overrides += ["precision=32-true", "witnesses=[]"]
    run("evaluate", *overrides, f"output={other}", task=evaluate.main)
    trained, evaluated = (json.loads((f / "metrics.json").read_text()) for f in (output, other))
    assert list(evaluated["rows"]) == ["ceiling", "reconstruction", "best", "shuffled", "floor"]
    own = [m["rows"]["reconstruction"]["spatial_cosine"]["mean"] for m in (trained, evaluated)]
    assert own[0] == pytest.approx(own[1], abs=1e-5)
    assert "feed-forward" in (other / "table.md").read_text()
    assert (output / "grids").is_dir()


def test_a_decoder_is_no_prior(decoder, tmp_path):
    save_model(decoder, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="holds no UNet, because it is a Decoder: expected a run"):
        load_prior(tmp_path)


def test_bad_input(config, decoder):
    with pytest.raises(InputError, match="The image size is 100, expected 8 times a power of two"):
        build_model({**config, "image_size": 100})
    with pytest.raises(InputError, match="Unknown conditioning of Decoder 'none'"):
        build_model({**config, "conditioning": "none"})
    two = config["backbone"] | {"layer": ["layer2", "layer4"]}
    with pytest.raises(InputError, match=r"inverts one layer, but backbone.layer is \[layer2, lay"):
        build_model({**config, "backbone": two})
    features = torch.randn(1, *decoder.backbone.feature_shape)
    with pytest.raises(InputError, match="has no sampler, but num_steps was given"):
        decoder.invert(features, num_steps=5)
