import csv
import json
import re
import shutil

import pytest
import torch
import wandb
from helpers import TINY, TINY_RUN, averaged, last, logged, mistake, run, steps_done, tiny_run
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import OmegaConf
from PIL import Image
from training.conftest import make_trainer, pictures, weights

from featinv import FeatInv, InputError
from featinv.checkpoints import build_model
from featinv.cli import train
from featinv.data import PhotosDataModule

# Results of a run


def test_a_run_leaves_everything_in_its_folder():
    folder = tiny_run()
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
        "checkpoints/last.ckpt",
        "config.yaml",
        "curves.png",
        "grids/step_0000002.png",
        "metrics.csv",
        "metrics.json",
        "metrics.jsonl",
        "model.safetensors",
        "per_image.csv",
        "reconstructions.png",
        "table.md",
        "train.log",
    }
    assert f"The run is in {folder}" in (folder / "train.log").read_text()
    assert "${" not in (folder / "config.yaml").read_text()


def test_metrics_are_logged_against_optimiser_steps():
    assert list(logged(tiny_run(), "train/loss")) == [0, 1]
    assert list(logged(tiny_run(), "val/loss")) == [1]
    with (tiny_run() / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "val/loss", "val/feature_cosine", "lr-AdamW"} <= set(rows[1])
    assert float(rows[1]["val/loss"]) == logged(tiny_run(), "val/loss")[1]


def test_the_evaluation_is_saved():
    folder = tiny_run()
    metrics = json.loads((folder / "metrics.json").read_text())
    own, other = {"ceiling", "codec", "reconstruction", "best"}, {"shuffled", "floor"}
    assert set(metrics["rows"]) == own | other
    assert (metrics["num_images"], metrics["num_samples"], metrics["seed"]) == (3, 2, 0)
    assert metrics["sampler"]["num_steps"] == 2
    assert metrics["checkpoint"] == str(folder / "model.safetensors")
    table = (folder / "table.md").read_text()
    mean = metrics["rows"]["reconstruction"]["spatial_cosine"]["mean"]
    assert f"{mean:.3f}" in table and "3 images, 2 samples each" in table
    assert len((folder / "per_image.csv").read_text().splitlines()) == 1 + 3


def test_the_saved_model_is_the_average():
    ema = last(tiny_run())["callbacks"]["EMA"]
    assert ema["num_averaged"] == 2
    torch.testing.assert_close(averaged(tiny_run()), ema["weights"], rtol=0, atol=0)
    state = last(tiny_run())["state_dict"].items()
    assert sum(not torch.equal(value, ema["weights"][key]) for key, value in state) > 50


def test_a_prior_and_a_model_trained_on_it_may_be_moved(tmp_path, monkeypatch):
    """With relative paths; the gain of training is logged from before the first step."""
    prior = tiny_run("conditioning=none")
    assert not (prior / "metrics.json").exists()
    assert f"model.unet.path={prior}" in (prior / "train.log").read_text()
    assert all(key.startswith("unet.") for key in averaged(prior))
    shutil.copytree(prior, tmp_path / "here" / "prior")
    monkeypatch.chdir(tmp_path / "here")
    overrides = [*TINY_RUN, "model=small_on_prior", "model.unet.path=prior", "output=model"]
    run("train", *overrides, "evaluation.num_images=1", "seed=1", "validate_first=true")

    folder = tmp_path / "here" / "model"
    for name in (*averaged(folder), *last(folder)["state_dict"]):
        assert name.split(".")[0] in ("controlnet", "feature_encoder")
    unet = FeatInv.load(folder).unet.state_dict()
    torch.testing.assert_close({f"unet.{k}": v for k, v in unet.items()}, averaged(prior))
    cosines = logged(folder, "val/feature_cosine")
    assert list(cosines) == [0, 1]  # before the first step, and after the last
    gain = f"val/feature_cosine went from {cosines[0]:.3f} at step 0 to {cosines[1]:.3f} at step 1"
    assert gain in (folder / "train.log").read_text()
    assert (folder / "grids" / "step_0000000.png").exists()

    monkeypatch.chdir(tmp_path)
    shutil.move("here", "there")
    run("train", "resume=there/model", "trainer.max_steps=3")
    assert steps_done(tmp_path / "there" / "model") == [0, 1, 2]


def test_a_run_may_start_from_the_weights_of_another(capsys, tmp_path):
    start = f"init_from={tiny_run()}"
    run("train", *TINY, start, "model.optimizer.lr=0", "seed=1", f"output={tmp_path / 'same'}")
    torch.testing.assert_close(averaged(tmp_path / "same"), averaged(tiny_run()), rtol=0, atol=0)
    overrides = [*TINY, start, "model.hidden_channels=8", f"output={tmp_path / 'other'}"]
    said = mistake(capsys, "train", *overrides)
    assert said.startswith("The checkpoint does not fit the model: 'feature_encoder.")


# Precision


def test_mixed_precision_is_recorded_and_keeps_weights_in_float32(tmp_path, monkeypatch):
    """Chosen by time, without averaged weights."""
    seconds = {"32-true": 2.0, "bf16-mixed": 1.0}
    monkeypatch.setattr(train.precision, "convolution_seconds", lambda device: seconds)
    overrides = ["trainer.precision=auto", "~callbacks.ema", "evaluation.num_images=1"]
    run("train", *TINY, *overrides, f"output={tmp_path}")
    assert OmegaConf.load(tmp_path / "config.yaml").trainer.precision == "bf16-mixed"
    assert json.loads((tmp_path / "metrics.json").read_text())["precision"] == "bf16-mixed"
    assert "on cpu in bf16-mixed" in (tmp_path / "table.md").read_text()
    assert "precision=bf16-mixed: a convolution takes" in (tmp_path / "train.log").read_text()
    assert {value.dtype for value in averaged(tmp_path).values()} == {torch.float32}
    torch.testing.assert_close(averaged(tmp_path), last(tmp_path)["state_dict"], rtol=0, atol=0)
    exact = logged(tiny_run(), "train/loss")
    for step, loss in logged(tmp_path, "train/loss").items():
        assert loss == pytest.approx(exact[step], rel=0.05) and loss != exact[step]


def test_the_precision_of_a_run(monkeypatch):
    """Measured on CPUs, for any number of ranks; not on GPUs."""
    seconds = {"32-true": 2.0, "bf16-mixed": 1.0}
    monkeypatch.setattr(train.precision, "convolution_seconds", lambda device: seconds)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)

    def chosen(gpu: bool = False, **trainer: object) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        values = {"precision": "auto", "accelerator": "auto", "devices": 1, **trainer}
        config = OmegaConf.create({"trainer": values})
        train.choose_precision(config)
        return config.trainer.precision

    assert chosen() == "bf16-mixed"
    assert chosen(devices=2) == chosen(num_nodes=2) == "bf16-mixed"
    assert chosen(precision="64-true") == "64-true"  # Lightning's own
    assert chosen(gpu=True, devices=8, num_nodes=2) == "bf16-mixed"


def test_the_evaluation_may_have_a_precision_of_its_own():
    config = OmegaConf.load(tiny_run() / "config.yaml")
    model = build_model(OmegaConf.to_container(config.model))
    config.trainer.precision = "bf16-mixed"
    for given, expected in (("auto", "bf16-mixed"), ("32-true", "32-true")):
        config.evaluation.precision = given
        assert train.make_evaluator(config, model).precision == expected


# Optimiser steps are the clock


def test_an_epoch_is_counted_in_samples():
    """Thirteen photographs in batches of 2 x 2: three epochs are ten optimiser steps."""
    data = PhotosDataModule(image_size=8, batch_size=2, crops_per_photo=1)
    trainer = {"devices": 1, "accumulate_grad_batches": 2, "max_steps": 1}
    config = OmegaConf.create({"epochs": 3, "trainer": trainer, "resume": None})
    train.set_steps(config, data)
    assert config.trainer.max_steps == 10
    for epochs, devices in ((0, 1), (1, "auto"), ("three", 1)):
        config = OmegaConf.create({"epochs": epochs, "trainer": trainer | {"devices": devices}})
        with pytest.raises(InputError, match=f"{epochs} with trainer.devices={devices}, expected"):
            train.set_steps(config, data)


def test_two_micro_batches_are_one_batch_of_twice_the_size(tiny_config, tmp_path):
    # Adam with hardly any second moment would turn rounding errors into steps
    tiny_config["optimizer"] = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}
    models = []
    for size in (2, 1):
        torch.manual_seed(0)
        models.append(build_model(tiny_config))
        options = {"max_steps": 2, "accumulate_grad_batches": 2 // size}
        make_trainer(tmp_path, **options).fit(models[-1], pictures(4, size))
    before = build_model(tiny_config)
    torch.testing.assert_close(*map(weights, models), rtol=1e-4, atol=1e-6)
    assert not torch.equal(models[0].unet.conv_in.weight, before.unet.conv_in.weight)


# Weights & Biases


@pytest.fixture
def wandb_runs(monkeypatch):
    """Record what the runs hold when they are finished; nothing is sent."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    runs, finish = [], wandb.finish

    def record(exit_code=None):
        run = wandb.run
        runs.append((run.offline, dict(run.config), dict(run.summary), exit_code))
        finish(exit_code=exit_code)

    monkeypatch.setattr(wandb, "finish", record)
    return runs


def test_wandb_offline(tmp_path, wandb_runs):
    run("train", *TINY, "logger=wandb", f"output={tmp_path}", "evaluation.num_images=1")
    ((offline, config, summary, exit_code),) = wandb_runs
    assert offline and exit_code == 0
    assert config["model"]["backbone"]["name"] == "resnet10t"
    assert config["trainer"]["max_steps"] == 2
    assert {"train/loss", "val/loss", "val/feature_cosine_shuffled", "table"} <= set(summary)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (picture,) = (folder / "files" / "media" / "images").rglob("*.png")
    with Image.open(picture) as image, Image.open(tmp_path / "grids/step_0000002.png") as grid:
        assert image.tobytes() == grid.tobytes()
    (table,) = (folder / "files" / "media" / "table").rglob("*.json")
    assert "cosine" in json.loads(table.read_text())["columns"]
    assert f"wandb sync {folder}" in (tmp_path / "train.log").read_text()
    assert (tmp_path / "metrics.csv").exists()  # files too
    assert wandb.run is None

    run("train", f"resume={tmp_path}", "trainer.max_steps=3")  # continues the same W&B run
    folders = (tmp_path / "wandb").glob("offline-run-*")
    assert len({folder.name.split("-")[-1] for folder in folders}) == 1 and len(wandb_runs) == 2


def test_wandb_is_finished_after_a_failure(monkeypatch):
    def boom(config) -> None:
        raise RuntimeError("boom")

    finished = []
    monkeypatch.setattr(train, "train", boom)
    monkeypatch.setattr(train, "finish_wandb", lambda failed: finished.append(failed))
    with pytest.raises(RuntimeError, match="boom"):
        train.main(OmegaConf.create())
    assert finished == [True]


# Bad input


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trainer.devices=0", "The trainer cannot be set up (`Trainer(devices=0)` value is not"),
        ("model.optimizer.lr=-1", "The values of model.optimizer do not fit: Invalid learning r"),
    ],
)
def test_impossible_values_fail_before_training(capsys, tmp_path, override, sentence):
    found = mistake(capsys, "train", *TINY, f"output={tmp_path}", override)
    assert found.startswith(sentence)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("trainer.max_steps", None, "trainer.max_steps is None: expected an integer of at least 1"),
        ("validate_every_n_steps", 0, "validate_every_n_steps is 0: expected an integer of at"),
        ("seed", 10**12, "seed is 1000000000000, expected 0 to 4294967295."),
        ("model.train_unet", False, "model.train_unet=false would freeze a UNet with random weigh"),
        ("model.unet.path", "RUN", "The run would overwrite its prior 'RUN': choose another outp"),
        ("model.unet.path", "RUN/model.safetensors", "The run would overwrite its prior"),
    ],
)
def test_values_that_the_trainer_would_accept_silently(key, value, sentence):
    config, run = OmegaConf.load(tiny_run() / "config.yaml"), str(tiny_run())
    value = value.replace("RUN", run) if isinstance(value, str) else value
    OmegaConf.update(config, key, value)
    with pytest.raises(InputError, match=re.escape(sentence.replace("RUN", run))):
        train.check_config(config)


def test_ranks_must_share_a_folder(monkeypatch):
    """As when Slurm starts each with a folder named by the time."""
    config = OmegaConf.load(tiny_run() / "config.yaml")
    monkeypatch.setattr(LightningEnvironment, "creates_processes_externally", True)
    config.trainer.strategy, config.trainer.devices = "ddp", 2
    config.output = "outputs/${now:%H-%M-%S}"
    with pytest.raises(InputError, match="Each rank would have its own folder"):
        train.make_trainer(config)
