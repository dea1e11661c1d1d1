import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from helpers import (
    STEADY,
    TINY,
    TINY_RUN,
    assert_same_run,
    averaged,
    boom,
    last,
    logged,
    mistake,
    run,
    tiny_run,
)
from omegaconf import OmegaConf
from PIL import Image

from featinv import FeatInv

ROOT = Path(__file__).parents[2]

# What a run leaves


@pytest.mark.parametrize("conditioning", ["spatial", "pooled"])
def test_a_run_leaves_everything_in_its_folder(conditioning):
    folder = tiny_run(f"conditioning={conditioning}")
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
    for name in files:
        assert (folder / name).stat().st_size > 0
    for name in ("curves.png", "grids/step_0000002.png", "reconstructions.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(10**7)) > 10  # not blank
    assert f"The run is in {folder}" in (folder / "train.log").read_text()


def test_the_config_is_resolved():
    text = (tiny_run() / "config.yaml").read_text()
    config = OmegaConf.create(text)
    assert "${" not in text
    assert config.model.backbone.name == config.backbone.name == "resnet10t"
    assert config.data.image_size == 64
    assert config.callbacks.sample_grid.folder == f"{config.output}/grids"


def test_a_second_run_in_the_same_folder_starts_its_metrics_anew(tmp_path):
    run("train", *TINY, f"output={tmp_path}")
    run("train", *TINY, f"output={tmp_path}", "trainer.max_steps=1")
    assert list(logged(tmp_path, "train/loss")) == [0]


def test_metrics_are_logged_against_optimiser_steps():
    folder = tiny_run()
    assert list(logged(folder, "train/loss")) == [0, 1]
    assert list(logged(folder, "val/loss")) == [1]
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1"]
    assert {"train/loss", "val/loss", "val/feature_cosine", "lr-AdamW"} <= set(rows[1])
    assert float(rows[1]["val/loss"]) == logged(folder, "val/loss")[1]


def test_an_epoch_is_counted_in_samples(tmp_path):
    """Thirteen photographs in batches of 2 x 2: three epochs are ten optimiser steps."""
    overrides = ["epochs=3", "trainer.accumulate_grad_batches=2", "evaluation.num_images=2"]
    run("train", *TINY, *overrides, f"output={tmp_path}")
    assert last(tmp_path)["global_step"] == 10
    config = OmegaConf.load(tmp_path / "config.yaml")
    assert (config.trainer.max_steps, config.epochs) == (10, 3)
    run("train", f"resume={tmp_path}", "trainer.max_steps=11")  # steps replace epochs
    assert last(tmp_path)["global_step"] == 11


def test_the_evaluation_is_written_down():
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


def test_what_training_gains_is_said(tmp_path):
    run("train", *TINY, f"output={tmp_path}", "validate_first=true")
    cosines = logged(tmp_path, "val/feature_cosine")
    assert list(cosines) == [0, 1]  # before the first step, and after the last
    said = f"val/feature_cosine went from {cosines[0]:.3f} at step 0 to {cosines[1]:.3f} at step 1"
    assert said in (tmp_path / "train.log").read_text()
    assert (tmp_path / "grids" / "step_0000000.png").exists()
    assert not (tiny_run() / "grids" / "step_0000000.png").exists()


def test_the_saved_model_is_the_average(tmp_path):
    run("train", *TINY, *STEADY, f"output={tmp_path}", "trainer.max_steps=3")
    ema = last(tmp_path)["callbacks"]["EMA"]
    assert ema["num_averaged"] == 3
    torch.testing.assert_close(averaged(tmp_path), ema["weights"])
    changed = [
        key
        for key, value in last(tmp_path)["state_dict"].items()
        if not torch.equal(value, ema["weights"][key])
    ]
    assert len(changed) > 50


def test_a_prior_and_a_model_on_it(tmp_path, capsys):
    prior = tiny_run("conditioning=none")
    assert not (prior / "metrics.json").exists()
    assert f"model.unet.path={prior}" in (prior / "train.log").read_text()
    assert all(key.startswith("unet.") for key in averaged(prior))

    overrides = ["model=small_on_prior", f"model.unet.path={prior}", f"output={tmp_path}"]
    run("train", *TINY_RUN, *overrides)
    assert all(key.startswith("controlnet.") for key in averaged(tmp_path))
    assert not any(key.startswith("unet.") for key in last(tmp_path)["state_dict"])
    unet = FeatInv.load(tmp_path).unet.state_dict()
    torch.testing.assert_close({f"unet.{k}": v for k, v in unet.items()}, averaged(prior))
    assert (tmp_path / "table.md").exists()


def test_without_averaging(tmp_path):
    run("train", *TINY, "~callbacks.ema", f"output={tmp_path}")
    torch.testing.assert_close(averaged(tmp_path), last(tmp_path)["state_dict"])


def test_mixed_precision_keeps_the_weights_in_float32(tmp_path):
    run("train", *TINY, "trainer.precision=bf16-mixed", f"output={tmp_path}")
    assert {value.dtype for value in averaged(tmp_path).values()} == {torch.float32}
    exact = logged(tiny_run(), "train/loss")
    for step, loss in logged(tmp_path, "train/loss").items():
        assert loss == pytest.approx(exact[step], rel=0.05) and loss != exact[step]


def test_the_same_seed_gives_the_same_run(tmp_path):
    run("train", *TINY, f"output={tmp_path}")
    assert_same_run(tmp_path, tiny_run())
    assert logged(tmp_path, "val/loss") == logged(tiny_run(), "val/loss")


def test_another_seed_gives_another_run(tmp_path):
    run("train", *TINY, f"output={tmp_path}", "seed=1")
    assert logged(tmp_path, "train/loss").values() != logged(tiny_run(), "train/loss").values()
    assert not torch.equal(
        averaged(tmp_path)["unet.conv_in.weight"], averaged(tiny_run())["unet.conv_in.weight"]
    )


# Optimiser steps are the clock


def test_two_micro_batches_are_one_batch_of_twice_the_size(tmp_path):
    # Adam with hardly any second moment would turn rounding errors into steps
    steady = [*STEADY, "model.optimizer._target_=torch.optim.SGD"]
    halves = ["data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    run("train", *TINY, *steady, f"output={tmp_path / 'whole'}")
    run("train", *TINY, *steady, *halves, f"output={tmp_path / 'halves'}")
    torch.testing.assert_close(
        averaged(tmp_path / "halves"), averaged(tmp_path / "whole"), rtol=1e-4, atol=1e-6
    )


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
    run("train", *TINY, "logger=wandb", f"output={tmp_path}")
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
    table = json.loads(table.read_text())
    assert "spatial cosine" in table["columns"]
    assert [row[0].split(":")[0] for row in table["data"]] == [
        "ceiling",
        "codec",
        "reconstruction",
        "best reconstruction of an image, by its spatial cosine",
        "shuffled",
        "floor",
    ]
    assert f"wandb sync {folder}" in (tmp_path / "train.log").read_text()
    assert (tmp_path / "metrics.csv").exists()  # files as ever
    assert wandb.run is None


def test_wandb_is_finished_after_a_failure(tmp_path, wandb_runs):
    with pytest.raises(RuntimeError, match="boom"):
        run("train", *TINY, *boom("crash", 1, tmp_path), "logger=wandb", f"output={tmp_path}")
    ((offline, _, summary, exit_code),) = wandb_runs
    assert offline and exit_code == 1
    assert "train/loss" in summary and "table" not in summary
    assert wandb.run is None
    assert "wandb sync" in (tmp_path / "train.log").read_text()
    assert (tmp_path / "metrics.csv").exists()


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, wandb_runs):
    run("train", *TINY, "logger=wandb", f"output={tmp_path}")
    run("train", f"resume={tmp_path}", "trainer.max_steps=3")
    run("train", *TINY, "logger=wandb", f"output={tmp_path}", "evaluation.num_samples=1")
    first, second, other = sorted((tmp_path / "wandb").glob("offline-run-*"), key=os.path.getctime)
    ids = [folder.name.split("-")[-1] for folder in (first, second, other)]
    assert ids[0] == ids[1] != ids[2]


def test_wandb_going_away_does_not_stop_a_run(tmp_path, wandb_runs, monkeypatch):
    def gone(*args, **options):
        raise ConnectionError("the network is gone for good")

    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", gone)
    run("train", *TINY, "logger=wandb", f"output={tmp_path}")
    assert (tmp_path / "table.md").exists() and list(logged(tmp_path, "train/loss")) == [0, 1]
    assert "the network is gone for good" in (tmp_path / "train.log").read_text()


# Bad input


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("backbone.name=resnet5O", "Unknown backbone 'resnet5O': did you mean resnet50,"),
        ("backbone.layer=layer5", "Unknown layer of backbone 'resnet10t' 'layer5': did you mean"),
        ("backbone.weights=none.pth", "Unknown weights 'none.pth' for backbone 'resnet10t'"),
        ("conditioning=spatail", "Unknown conditioning 'spatail': did you mean spatial?"),
        (
            "model.train_unet=false",
            "model.train_unet=false would freeze a UNet with random weights",
        ),
        ("sampler.guidance_scale=-1", "sampler.guidance_scale is -1, expected 0 or more"),
        ("sampler.num_steps=0", "sampler.num_steps is 0, expected 1 to 1000."),
        ("sampler.scheduler=dimm", "Unknown scheduler 'dimm': did you mean ddim?"),
        ("data.batch_size=0", "batch_size is 0: expected an integer of at least 1"),
        ("data.crops_per_photo=0", "crops_per_photo is 0: expected an integer of at least 1"),
        ("evaluation.num_samples=0", "num_samples is 0: expected an integer of at least 1"),
        ("evaluation.num_images=0", "max_images is 0: expected an integer of at least 1"),
        ("evaluation.batch_size=0", "batch_size is 0: expected an integer of at least 1"),
        ("trainer.max_steps=0", "trainer.max_steps is 0: expected an integer of at least 1"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches is 0: expected"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps is 0: expected an integer"),
        ("trainer.accelerator=npu", "The configuration does not fit: You selected an invalid ac"),
        ("trainer.precision=bf15", "The configuration does not fit: Precision 'bf15' is invalid"),
        ("trainer.devices=0", "The trainer cannot be set up (`Trainer(devices=0)` value is not"),
        ("+trainer.speed=3", "The configuration does not fit: Trainer.__init__() got an unexp"),
        ("epochs=0", "epochs is 0 with trainer.devices=1, expected a number above 0 and a nu"),
        ("epochs=1 trainer.devices=auto", "epochs is 1 with trainer.devices=auto, expected"),
        ("validate_every_n_steps=0", "validate_every_n_steps is 0: expected an integer of at le"),
        ("callbacks.ema.decay=1", "ema.decay is 1, expected 0 or more and less than 1."),
        ("callbacks.sample_grid.num_images=1", "sample_grid.num_images is 1: expected an integ"),
        ("callbacks.sample_grid.num_steps=0", "sample_grid.num_steps is 0: expected an integer"),
        ("callbacks.save_last.every_n_steps=0", "save_last.every_n_steps is 0: expected an int"),
        ("model.optimizer.lr=-1", "The values of model.optimizer do not fit: Invalid learning r"),
        ("+model.optimizer.beta=1", "The values of model.optimizer do not fit: AdamW.__init__()"),
        ("model.optimizer._target_=os.system", "The model's config names 'os.system', which is"),
        ("model.image_size=30", "The image size is 30, expected a multiple of the codec's patch"),
        ("model.lr_schedule=cosin", "Unknown model.lr_schedule 'cosin': did you mean cosine?"),
        (
            "model.unet.block_out_channels=[32]",
            "The configuration of UNet2DConditionModel does not fit: Must provide",
        ),
        ("seed=-1", "seed is -1, expected 0 to 4294967295."),
        ("seed=1e12", "seed is 1000000000000, expected 0 to 4294967295."),
    ],
)
def test_impossible_values_are_told_before_anything_is_trained(
    capsys, tmp_path, overrides, sentence
):
    told = mistake(capsys, "train", *TINY, f"output={tmp_path}", *overrides.split())
    assert told.startswith(sentence)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="has two GPUs")
def test_more_gpus_than_there_are(capsys, tmp_path):
    overrides = ["trainer.accelerator=gpu", "trainer.devices=2", f"output={tmp_path}"]
    assert mistake(capsys, "train", *TINY, *overrides).startswith("The trainer cannot be set up (")


def test_a_prior_that_does_not_fit(capsys, tmp_path):
    prior = tiny_run("conditioning=none")
    overrides = [*TINY_RUN, "model=small_on_prior", f"output={tmp_path}"]
    told = mistake(capsys, "train", *overrides, "model.unet.path=nothing")
    assert told.startswith("There is no checkpoint 'nothing'")
    overrides += [f"model.unet.path={prior}", "model.codec.num_components=5"]
    assert mistake(capsys, "train", *overrides).startswith(
        "The UNet takes latents of 4 channels, but the codec's have 5"
    )


def test_a_run_does_not_overwrite_its_prior(capsys):
    prior = tiny_run("conditioning=none")
    overrides = [*TINY_RUN, "model=small_on_prior", f"output={prior}"]
    for path in (prior, prior / "model.safetensors"):
        told = mistake(capsys, "train", *overrides, f"model.unet.path={path}")
        assert told == f"The run would overwrite its prior '{path}': choose another output."
    FeatInv.load(prior)


def test_data_that_match_nothing(capsys, tmp_path):
    data = ["data=imagenette", f"data.root={tmp_path}", f"output={tmp_path / 'run'}"]
    overrides = [o for o in TINY if not o.startswith(("data=", "data.crops"))]
    sentence = mistake(capsys, "train", *overrides, *data)
    assert "imagenette-train-*.tar" in sentence and "match no file" in sentence


def test_an_output_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").touch()
    sentence = mistake(capsys, "train", *TINY, f"output={tmp_path}/file/run")
    assert sentence.startswith(f"Cannot use '{tmp_path}/file/run': Not a directory")


# As a command


def command(*overrides: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        capture_output=True,
        text=True,
        env=env,
        timeout=100,
    )


def test_the_command_ends_bad_input_in_one_sentence(tmp_path):
    result = command(*TINY, f"output={tmp_path}", "sampler.guidance_scale=-1")
    assert result.returncode == 2
    assert result.stderr.startswith("Error: sampler.guidance_scale is -1")
    assert result.stderr.count("\n") == 1


def test_the_command_says_only_what_matters(tmp_path):
    result = command(*TINY, f"output={tmp_path}")
    assert result.returncode == 0
    lines = [line.split("\r")[-1] for line in result.stderr.splitlines()]
    assert [line for line in lines if line and not line.startswith("evaluate:")] == []
    assert "| reconstruction " in result.stdout
    assert result.stdout.rstrip().endswith(f"The run is in {tmp_path}")
