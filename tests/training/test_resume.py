import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    STEADY,
    TINY,
    assert_same_logs,
    assert_same_run,
    last,
    logged,
    mistake,
    run,
    steps_done,
    tiny_run,
)
from hydra.utils import get_object
from omegaconf import OmegaConf

from featinv import InputError
from featinv.checkpoints import load_model
from featinv.cli.resume import load_resumed
from featinv.cli.train import prepare_folder

LAST = Path("checkpoints") / "last.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[str], Path]:
    """A run of five steps of two batches, and its overrides."""
    folder = tmp_path_factory.mktemp("whole")
    overrides = [*TINY, *STEADY, "trainer.max_steps=5", "validate_every_n_steps=2"]
    overrides += ["trainer.accumulate_grad_batches=2", "evaluation.num_images=1"]
    run("train", *overrides, f"output={folder}")
    return overrides, folder


def grids(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "grids").iterdir())


def test_validation_every_so_many_optimiser_steps_under_accumulation(whole):
    _, folder = whole
    assert grids(folder) == ["step_0000002.png", "step_0000004.png"]
    assert list(logged(folder, "val/loss")) == [1, 3]
    assert list(logged(folder, "train/loss")) == [0, 1, 2, 3, 4]
    assert last(folder)["global_step"] == 5


def test_a_run_that_has_ended_goes_on_as_if_it_had_not(tmp_path, whole):
    """Moved to another folder, and with single values changed."""
    overrides, folder = whole
    first, second = tmp_path / "first", tmp_path / "second"
    run("train", *overrides, f"output={first}", "trainer.max_steps=2")
    assert last(first)["global_step"] == 2
    shutil.move(first, second)
    changes = ["trainer.max_steps=5", "evaluation.num_samples=1", "+trainer.max_time=00:01:00:00"]
    run("train", f"resume={second}", *changes)
    assert not first.exists()
    assert steps_done(second) == [0, 1, 2, 3, 4]
    assert_same_run(second, folder)
    assert_same_logs(second, folder, "train/loss", "val/loss", "val/feature_cosine", "lr-AdamW")
    assert grids(second) == grids(folder)
    config = OmegaConf.load(second / "config.yaml")
    assert config.output == str(second)
    assert config.callbacks.save_last.path == str(second / LAST)
    assert (config.trainer.max_steps, config.trainer.max_time) == (5, "00:01:00:00")
    assert config.model.image_size == 32  # not the default, which the command line names no more
    assert json.loads((second / "metrics.json").read_text())["num_samples"] == 1


def test_the_same_command_starts_a_run_goes_on_with_it_and_leaves_it_alone(tmp_path, whole):
    overrides, folder = whole
    boom = ["+callbacks.boom._target_=helpers.Boom", f"+callbacks.boom.marker={tmp_path}/boom"]
    command = [
        *overrides,
        f"output={tmp_path}",
        "resume=auto",
        "callbacks.save_last.every_n_steps=2",
    ]
    with pytest.raises(RuntimeError, match="boom"):
        run("train", *command, *boom, "+callbacks.boom.batch=6")
    assert last(tmp_path)["global_step"] == 2  # what was done since is lost
    for _ in range(2):  # the second time it has ended: nothing is done again
        run("train", *command)
        assert steps_done(tmp_path) == [0, 1, 2, 2, 3, 4]
        assert_same_run(tmp_path, folder)
        assert_same_logs(tmp_path, folder, "train/loss", "val/loss", "lr-AdamW")


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not(tmp_path, whole):
    """In validation, where the averaged weights stand in the model, and within a step."""
    overrides, folder = whole
    sent = ["+callbacks.sent._target_=helpers.Signal", "+callbacks.sent.name=SIGTERM"]
    in_validation = ["+callbacks.sent.batch=3", "+callbacks.sent.validation=true"]
    in_a_step = ["+callbacks.sent.batch=6", "+callbacks.sent.validation=false"]
    command = [*overrides, *sent, *in_validation, f"output={tmp_path}"]
    for step, arguments in ((2, command), (4, [f"resume={tmp_path}", *in_a_step])):
        with pytest.raises(SystemExit) as end:
            run("train", *arguments)
        assert end.value.code == 128 + 15
        assert last(tmp_path)["global_step"] == step
    assert f"python train.py resume={tmp_path}" in (tmp_path / "train.log").read_text()
    run("train", f"resume={tmp_path}", "+callbacks.sent.batch=-1")
    assert steps_done(tmp_path) == [0, 1, 2, 3, 4]
    assert_same_run(tmp_path, folder)
    assert_same_logs(tmp_path, folder, "train/loss", "val/loss", "lr-AdamW")


# What is resumed with which config


@pytest.mark.parametrize(
    "override",
    [
        "data=photos",
        "logger=wandb",
        "experiment=quickstart",
        "conditioning=pooled",
        "model.hidden_channels=8",
        "seed=1",
        "output=elsewhere",
        "~callbacks.ema",
    ],
)
def test_a_resumed_run_refuses_what_it_cannot_change(override):
    config = OmegaConf.create({"resume": str(tiny_run())})
    with pytest.raises(InputError, match=f"'{override}' cannot change a resumed run"):
        load_resumed(config, [override])


def test_steps_replace_epochs(tmp_path):
    shutil.copytree(tiny_run(), tmp_path, dirs_exist_ok=True)
    config = OmegaConf.load(tmp_path / "config.yaml")
    config.epochs = 3
    OmegaConf.save(config, tmp_path / "config.yaml")
    now = OmegaConf.create({"resume": str(tmp_path), "trainer": {"max_steps": 11}})
    assert load_resumed(now, []).epochs == 3
    resumed = load_resumed(now, ["trainer.max_steps=11"])
    assert (resumed.epochs, resumed.trainer.max_steps) == (None, 11)


@pytest.mark.parametrize("resume", ["nothing", "empty", "file"])
def test_resuming_what_is_no_run(tmp_path, resume):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    config = OmegaConf.create({"resume": str(tmp_path / resume)})
    with pytest.raises(InputError, match=f"no run to resume in '{tmp_path / resume}': expected"):
        load_resumed(config, [])


def test_resuming_with_a_corrupt_checkpoint(tmp_path):
    shutil.copytree(tiny_run(), tmp_path, dirs_exist_ok=True)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:1000])
    with pytest.raises(InputError, match=f"The checkpoint '{tmp_path / LAST}' is damaged"):
        load_resumed(OmegaConf.create({"resume": str(tmp_path)}), [])
    load_model(tmp_path)  # the averaged weights are whole


def test_another_command_does_not_go_on_with_a_run(capsys):
    folder = tiny_run()
    before = (folder / "config.yaml").read_bytes()
    told = mistake(capsys, "train", *TINY, f"output={folder}", "resume=auto", "seed=1")
    assert told == (
        f"seed is 1, but the run in '{folder}' was started with 0: expected the same to go on with "
        "it, or another output for a new run."
    )
    assert (folder / "config.yaml").read_bytes() == before


def test_a_new_run_has_nothing_of_the_one_before_it_in_its_folder(tmp_path):
    """It may end before it has saved or logged: least of all may it go on with the old run."""
    shutil.copytree(tiny_run(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "wandb_id.txt").touch()
    config = OmegaConf.load(tmp_path / "config.yaml")
    config.output = str(tmp_path)
    prepare_folder(config)
    for name in (LAST, "metrics.jsonl", "wandb_id.txt"):
        assert not (tmp_path / name).exists()


def test_the_classes_that_a_run_of_an_earlier_version_names_are_found(tmp_path):
    shutil.copytree(tiny_run(), tmp_path, dirs_exist_ok=True)
    old = Path(__file__).parents[1] / "saved_runs" / "v0.1" / "config.yaml"
    shutil.copy(old, tmp_path / "config.yaml")
    resumed = load_resumed(OmegaConf.create({"resume": str(tmp_path)}), [])
    assert resumed.callbacks.save_last.path == str(tmp_path / LAST)
    for part in (*resumed.callbacks.values(), *resumed.logger.values(), resumed.data):
        assert callable(get_object(part["_target_"]))


@pytest.mark.parametrize("batch", [2, 3])  # the first and the second of the second step
def test_a_run_goes_on_with_batches_of_another_size(tmp_path, batch):
    """Every sample once, 13 in an epoch."""
    options = ["epochs=1", "trainer.accumulate_grad_batches=2", f"output={tmp_path}"]
    sent = ["+callbacks.sent._target_=helpers.Signal", "+callbacks.sent.name=SIGTERM"]
    with pytest.raises(SystemExit):
        run("train", *TINY, *options, *sent, f"+callbacks.sent.batch={batch}")
    changed = ["data.batch_size=1", "trainer.accumulate_grad_batches=5"]
    spy = ["+callbacks.spy._target_=spy.Spy", f"+callbacks.spy.folder={tmp_path}"]
    run("train", f"resume={tmp_path}", "+callbacks.sent.batch=-1", *changed, *spy)
    seen = torch.load(tmp_path / "spy-0.pt", weights_only=True)
    assert seen["samples"] == [[number] for number in range(8, 13)]
    assert last(tmp_path)["global_step"] == 2 + 1
