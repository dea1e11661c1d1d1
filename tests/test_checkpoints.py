"""Model files: saving, loading, and errors."""

import json
import os
import shutil

import pytest
import torch
from helpers import tiny_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from featinv import FeatInv, InputError
from featinv.checkpoints import (
    build_model,
    load_model,
    load_prior,
    read_checkpoint,
    save_model,
    slim,
)
from featinv.cli.convert import main


def randomise(model: FeatInv) -> FeatInv:
    """Give every trained weight a value of its own: fresh models have many zeros."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.trained().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return model


def predict(model: FeatInv) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    z_t = torch.randn(2, *model.latent_shape, generator=generator)
    features = torch.randn(2, *model.backbone.feature_shape, generator=generator)
    with torch.no_grad():
        return model.denoise(z_t, torch.tensor([3, 700]), features=features)


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A model and the file that it was saved to."""
    path = tmp_path / "model.safetensors"
    save_model(randomise(tiny_model), path)
    return tiny_model, path


def rewrite(path, state: dict | None = None, **metadata: object) -> None:
    """Change weights or metadata of a saved model."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    new = old | {key: json.dumps(value) for key, value in metadata.items()}
    save_file(load_file(path) if state is None else state, path, new)


@pytest.fixture
def on_prior(saved, tiny_config) -> dict:
    """The config of a model with the saved one as a frozen prior."""
    unet = {"_target_": "featinv.checkpoints.load_prior", "path": str(saved[1])}
    return tiny_config | {"unet": unet, "train_unet": False}


# Saving and loading


def test_a_loaded_model_predicts_the_same_and_is_saved_the_same(saved, tmp_path):
    model, path = saved
    config, frozen, state = read_checkpoint(path)
    assert config == model.config and set(frozen) == {"backbone", "codec"}
    assert state.keys() == model.trained().state_dict().keys()
    loaded = load_model(path)
    assert not loaded.training
    torch.testing.assert_close(predict(loaded), predict(model.eval()), rtol=0, atol=0)
    save_model(loaded, tmp_path / "again.safetensors")
    with safe_open(path, "pt") as one, safe_open(tmp_path / "again.safetensors", "pt") as two:
        assert one.metadata() == two.metadata()


def test_every_file_of_a_run_loads_the_averaged_model(tmp_path):
    run = tiny_run()
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")  # as of a run in progress
    expected = load_file(run / "model.safetensors")
    for path in (run, run / "model.safetensors", run / "checkpoints" / "last.ckpt", tmp_path):
        state = dict(load_model(path).trained().state_dict())
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_a_training_state_holds_no_frozen_weight_and_no_code():
    path = tiny_run() / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    trained = FeatInv.load(tiny_run()).trained().state_dict()
    assert checkpoint["state_dict"].keys() == trained.keys()
    assert checkpoint["featinv"]["config"]["backbone"]["name"] == "resnet10t"
    assert set(checkpoint["featinv"]["frozen"]) == {"backbone", "codec"}
    size = sum(value.numel() for value in trained.values())
    assert path.stat().st_size < 4 * 4 * size * 1.2  # weights, average, two moments


# On a frozen prior


def test_a_model_on_a_prior_saves_only_its_own_weights(saved, on_prior, tmp_path):
    model = build_model(on_prior)
    torch.testing.assert_close(model.unet.state_dict(), saved[0].unet.state_dict())
    path = tmp_path / "on_prior.safetensors"
    save_model(model, path)
    _, frozen, state = read_checkpoint(path)
    assert not any(key.startswith("unet.") for key in state)
    assert set(frozen) == {"backbone", "codec", "unet"}
    torch.testing.assert_close(predict(load_model(path)), predict(model.eval()))
    with pytest.raises(InputError, match="holds no UNet, because it was trained on a frozen one"):
        load_prior(path)


def test_a_changed_prior_is_detected(saved, on_prior, tmp_path):
    model, prior = saved
    save_model(build_model(on_prior), tmp_path / "on_prior.safetensors")
    model.unet.conv_in.bias.data += 1
    save_model(model, prior)
    with pytest.raises(InputError, match=rf"trained with another unet: .*, {prior}\); use"):
        load_model(tmp_path / "on_prior.safetensors")


# In half precision


def test_a_slim_model_is_the_model_in_half_the_bytes(saved, tmp_path, capsys):
    model, path = saved
    small = tmp_path / "small.safetensors"
    main(["slim", str(path), str(small)])
    assert "Wrote" in capsys.readouterr().out
    assert small.stat().st_size < 0.6 * path.stat().st_size
    loaded = load_model(small)
    for key, value in loaded.trained().state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.trained().state_dict()[key].half().float()), key
    assert loaded.config == model.config


def test_a_slim_model_may_have_new_sampler_values(saved, tmp_path, capsys):
    small = tmp_path / "small.safetensors"
    values = ["num_steps=3", "guidance_scale=2.5"]
    main(["slim", str(saved[1]), str(small), *values])
    sampler = load_model(small).sampler
    assert (sampler.num_steps, sampler.guidance_scale) == (3, 2.5)
    assert sampler.scheduler == saved[0].sampler.scheduler
    with pytest.raises(SystemExit, match="^2$"):
        main(["slim", str(saved[1]), str(small), "num_stps=3"])
    assert (
        "Unknown value of the sampler 'num_stps': did you mean num_steps" in capsys.readouterr().err
    )


def test_weights_beyond_half_precision_are_an_error(saved, tmp_path):
    model, path = saved
    model.unet.conv_in.bias.data[0] = 1e5
    save_model(model, path)
    with pytest.raises(InputError, match="unet.conv_in.bias' reach 100000, expected at most 65504"):
        slim(path, tmp_path / "small.safetensors")
    assert not (tmp_path / "small.safetensors").exists()


# What cannot be loaded


def test_a_path_without_a_checkpoint_says_what_exists(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no checkpoint.*emtpy.*holds empty"):
        FeatInv.load(tmp_path / "emtpy")
    with pytest.raises(InputError, match="not a finished run.*expected model.safetensors"):
        FeatInv.load(tmp_path / "empty")
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    shutil.copy(saved[1], tmp_path / "sweep" / "0")
    with pytest.raises(InputError, match=f"did you mean {tmp_path / 'sweep' / '0'}"):
        FeatInv.load(tmp_path / "sweep")


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoints/last.ckpt"])
def test_a_truncated_checkpoint(tmp_path, name):
    path = tmp_path / os.path.basename(name)
    for end in (0, 1000, -1):
        path.write_bytes((tiny_run() / name).read_bytes()[:end])
        with pytest.raises(InputError, match=f"{path}.*expected a file that train.py wrote"):
            FeatInv.load(path)


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {}, "callbacks": {}}, tmp_path / "plain.ckpt")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", {"config": "{"})
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match="expected a file that train.py wrote"):
            FeatInv.load(path)


class Malice:
    def __reduce__(self):
        return os.system, ("touch /tmp/featinv-was-here",)


def test_a_checkpoint_cannot_run_code_by_unpickling(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    torch.save({"state_dict": {}, "featinv": Malice()}, tmp_path / "bad.ckpt")
    with pytest.raises(InputError, match="cannot be read"):
        FeatInv.load(tmp_path / "bad.ckpt")
    assert ran == []


@pytest.mark.parametrize("place", ["", "deep"])
def test_a_config_cannot_run_code(saved, monkeypatch, place):
    model, path = saved
    config = json.loads(json.dumps(model.config))
    bad = {"_target_": "os.system", "command": "false"}
    if place == "deep":
        config["backbone"]["weights"] = [{"list": [bad]}]
    else:
        config = bad
    rewrite(path, config=config)
    ran = []
    monkeypatch.setattr(os, "system", lambda command: ran.append(command) or 0)
    with pytest.raises(InputError, match="os.system"):
        FeatInv.load(path)
    assert ran == []


def test_a_config_that_builds_no_model(saved):
    model, path = saved
    for config in ({}, model.config["backbone"]):
        rewrite(path, config=config)
        with pytest.raises(InputError, match="The config builds '.*', expected featinv.models.Dec"):
            load_model(path)


def test_an_unknown_argument_is_an_error(tiny_config):
    tiny_config["unet"]["depth"] = 3
    with pytest.raises(InputError, match="unexpected keyword argument 'depth'"):
        build_model(tiny_config)


def test_weights_of_another_backbone(saved, tmp_path):
    """The same name and shapes, but other weights: only the hash can tell."""
    model, path = saved
    other = {
        key: (value + 1).contiguous() for key, value in model.backbone.model.state_dict().items()
    }
    save_file(other, tmp_path / "other.safetensors")
    config = json.loads(json.dumps(model.config))
    config["backbone"]["weights"] = str(tmp_path / "other.safetensors")
    rewrite(path, config=config)
    with pytest.raises(InputError, match="trained with another backbone.* resnet10t,"):
        FeatInv.load(path)


def test_weights_of_another_architecture(saved):
    path = saved[1]
    state = load_file(path)
    del state["unet.conv_in.bias"]
    rewrite(path, state)
    with pytest.raises(InputError, match="does not fit the model: 'unet.conv_in.bias"):
        load_model(path)
