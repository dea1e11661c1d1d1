import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import (
    STEADY,
    TINY,
    assert_same_logs,
    assert_same_run,
    averaged,
    boom,
    last,
    logged,
    mistake,
    run,
    steps_done,
    tiny_run,
)
from omegaconf import OmegaConf

from featinv import InputError
from featinv.training.guards import StopOnSignal


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    overrides = [*TINY, *STEADY, "validate_every_n_steps=2"]
    run("train", *overrides, f"output={whole}", "trainer.max_steps=4")
    run("train", *overrides, f"output={parts}")
    assert last(parts)["global_step"] == 2
    run("train", f"resume={parts}", "trainer.max_steps=4")
    assert steps_done(parts) == [0, 1, 2, 3]
    assert_same_run(parts, whole)
    assert_same_logs(parts, whole, "train/loss", "val/loss", "val/feature_cosine", "lr-AdamW")
    assert {path.name for path in (parts / "grids").iterdir()} == {
        path.name for path in (whole / "grids").iterdir()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[str], Path]:
    """A run of five steps of two batches, and its overrides."""
    folder = tmp_path_factory.mktemp("whole")
    overrides = [*TINY, *STEADY, "trainer.max_steps=5", "validate_every_n_steps=2"]
    overrides += ["trainer.accumulate_grad_batches=2"]
    run("train", *overrides, f"output={folder}")
    return overrides, folder


def test_validation_every_so_many_optimiser_steps_under_accumulation(whole):
    _, folder = whole
    assert sorted(path.name for path in (folder / "grids").iterdir()) == [
        "step_0000002.png",
        "step_0000004.png",
    ]
    assert list(logged(folder, "val/loss")) == [1, 3]
    assert list(logged(folder, "train/loss")) == [0, 1, 2, 3, 4]
    assert last(folder)["global_step"] == 5


def test_a_resumed_run_with_accumulation_equals_one_that_was_not_interrupted(tmp_path, whole):
    overrides, folder = whole
    run("train", *overrides, f"output={tmp_path}", "trainer.max_steps=2")
    run("train", f"resume={tmp_path}", "trainer.max_steps=5")
    assert steps_done(tmp_path) == [0, 1, 2, 3, 4]
    assert_same_run(tmp_path, folder)
    assert_same_logs(tmp_path, folder, "train/loss", "val/loss", "lr-AdamW")


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path, whole):
    overrides, folder = whole
    overrides = [*overrides, *boom("crash", 6, tmp_path), "callbacks.save_last.every_n_steps=2"]
    with pytest.raises(RuntimeError, match="boom"):
        run("train", *overrides, f"output={tmp_path}")
    assert last(tmp_path)["global_step"] == 2
    run("train", f"resume={tmp_path}")
    assert steps_done(tmp_path) == [0, 1, 2, 2, 3, 4]
    assert_same_run(tmp_path, folder)
    assert_same_logs(tmp_path, folder, "train/loss", "val/loss", "lr-AdamW")


@pytest.mark.parametrize("batch", [6, 7])  # the first and the second of a step
def test_a_run_that_was_interrupted_goes_on_where_it_was(tmp_path, whole, batch):
    overrides, folder = whole
    with pytest.raises(SystemExit):
        run("train", *overrides, *boom("interruption", batch, tmp_path), f"output={tmp_path}")
    assert last(tmp_path)["global_step"] == 3
    assert f"python train.py resume={tmp_path}" in (tmp_path / "train.log").read_text()
    run("train", f"resume={tmp_path}")
    assert steps_done(tmp_path) == [0, 1, 2, 3, 4]
    assert_same_run(tmp_path, folder)
    assert_same_logs(tmp_path, folder, "train/loss", "val/loss", "lr-AdamW")


@pytest.mark.parametrize("batch", [2, 3])  # the first and the second of the second step
def test_a_run_goes_on_with_batches_of_another_size(tmp_path, batch):
    """Every sample once, 13 in an epoch; an accumulation that was begun is forgotten."""
    options = ["epochs=1", "trainer.accumulate_grad_batches=2", f"output={tmp_path}"]
    with pytest.raises(SystemExit):
        run("train", *TINY, *options, *boom("interruption", batch, tmp_path))
    changed = ["data.batch_size=1", "trainer.accumulate_grad_batches=3"]
    spy = ["+callbacks.spy._target_=spy.Spy", f"+callbacks.spy.folder={tmp_path}"]
    run("train", f"resume={tmp_path}", *changed, *spy)
    seen = torch.load(tmp_path / "spy-0.pt", weights_only=True)
    assert seen["samples"] == [[number] for number in range(4, 13)]
    assert len(seen["gradients"]) == 3 and last(tmp_path)["global_step"] == 1 + 3
    assert steps_done(tmp_path) == [0, 1, 2, 3]


def test_an_interruption_in_validation_saves_the_weights_of_training(tmp_path, whole):
    overrides, folder = whole
    overrides = [*overrides, *boom("interruption", 3, tmp_path, validation=True)]
    with pytest.raises(SystemExit):
        run("train", *overrides, f"output={tmp_path}")
    assert last(tmp_path)["global_step"] == 2
    run("train", f"resume={tmp_path}")
    assert_same_run(tmp_path, folder)
    assert_same_logs(tmp_path, folder, "train/loss")
    assert logged(tmp_path, "val/loss") == pytest.approx({3: logged(folder, "val/loss")[3]})


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run(), folder)
    run("train", f"resume={folder}")
    assert steps_done(folder) == [0, 1]
    assert_same_run(folder, tiny_run())


def test_a_run_that_was_moved_is_resumed_where_it_is(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(tiny_run(), first)
    shutil.move(first, second)
    run("train", f"resume={second}", "trainer.max_steps=3")
    assert not first.exists()
    assert last(second)["global_step"] == 3
    assert steps_done(second) == [0, 1, 2]
    config = OmegaConf.load(second / "config.yaml")
    assert config.output == str(second)
    assert config.callbacks.save_last.path == f"{second}/checkpoints/last.ckpt"
    assert last(tiny_run())["global_step"] == 2


def test_single_values_may_be_changed_on_resuming(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run(), folder)
    changes = ["trainer.max_steps=3", "evaluation.num_samples=1", "+trainer.max_time=00:01:00:00"]
    run("train", f"resume={folder}", *changes)
    config = OmegaConf.load(folder / "config.yaml")
    assert config.trainer.max_steps == 3
    assert config.trainer.max_time == "00:01:00:00"
    assert config.model.image_size == 32  # not the default, which the command line names no more
    assert json.loads((folder / "metrics.json").read_text())["num_samples"] == 1


@pytest.mark.parametrize(
    "override",
    [
        "data=photos",
        "model=small",
        "logger=wandb",
        "experiment=quickstart",
        "conditioning=pooled",
        "backbone.layer=layer3",
        "model.hidden_channels=8",
        "sampler.num_steps=3",
        "seed=1",
        "output=elsewhere",
        "~callbacks.ema",
    ],
)
def test_a_resumed_run_refuses_what_it_cannot_change(capsys, override):
    folder = tiny_run()
    before = (folder / "config.yaml").read_bytes()
    sentence = mistake(capsys, "train", f"resume={folder}", override)
    assert sentence.startswith(f"'{override}' cannot change a resumed run")
    assert (folder / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("resume", ["nothing", "empty", "file"])
def test_resuming_what_is_no_run(capsys, tmp_path, resume):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    output = f"output={tmp_path / 'new'}"
    sentence = mistake(capsys, "train", f"resume={tmp_path / resume}", output)
    assert sentence.startswith(f"There is no run to resume in '{tmp_path / resume}': expected")
    assert not list((tmp_path / "empty").iterdir()) and not (tmp_path / "nothing").exists()


def test_resuming_with_a_corrupt_checkpoint(capsys, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run(), folder)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    sentence = mistake(capsys, "train", f"resume={folder}", "trainer.max_steps=3")
    assert sentence.startswith(f"The checkpoint '{checkpoint}' is damaged")
    assert averaged(folder).keys() == averaged(tiny_run()).keys()


# The same command again


def test_the_same_command_starts_a_run_and_goes_on_with_it(tmp_path):
    command = [*TINY, *STEADY, f"output={tmp_path}", "resume=auto"]
    with pytest.raises(RuntimeError, match="boom"):
        run("train", *command, *boom("crash", 1, tmp_path), "callbacks.save_last.every_n_steps=1")
    assert last(tmp_path)["global_step"] == 1
    run("train", *command, "trainer.max_steps=3")
    assert steps_done(tmp_path) == [0, 1, 2]
    assert OmegaConf.load(tmp_path / "config.yaml").trainer.max_steps == 3
    run("train", *command, "trainer.max_steps=3")  # it has ended: nothing is done again
    assert steps_done(tmp_path) == [0, 1, 2]


def test_another_command_does_not_go_on_with_a_run(capsys):
    folder = tiny_run()
    before = (folder / "config.yaml").read_bytes()
    told = mistake(capsys, "train", *TINY, f"output={folder}", "resume=auto", "seed=1")
    assert told == (
        f"seed is 1, but the run in '{folder}' was started with 0: expected the same to go on with "
        "it, or another output for a new run."
    )
    assert (folder / "config.yaml").read_bytes() == before


def test_a_new_run_is_not_mixed_up_with_the_one_before(tmp_path):
    """It ends before it has saved: there is nothing to go on with, least of all the old run."""
    shutil.copytree(tiny_run(), tmp_path, dirs_exist_ok=True)
    with pytest.raises(RuntimeError, match="boom"):
        run("train", *TINY, f"output={tmp_path}", "seed=1", *boom("crash", 0, tmp_path))
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


# Signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_first(tmp_path, whole, name, caplog):
    overrides, folder = whole
    sent = ["+callbacks.sent._target_=helpers.Signal", f"+callbacks.sent.name={name}"]
    handlers = [signal.getsignal(number) for number in signal.Signals]
    with pytest.raises(SystemExit) as end:
        run("train", *overrides, *sent, "+callbacks.sent.batch=6", f"output={tmp_path}")
    assert end.value.code == 128 + signal.Signals[name]
    assert last(tmp_path)["global_step"] == 3
    assert f"python train.py resume={tmp_path}" in (tmp_path / "train.log").read_text()
    assert [signal.getsignal(number) for number in signal.Signals] == handlers
    run("train", f"resume={tmp_path}", "+callbacks.sent.batch=-1")
    assert steps_done(tmp_path) == [0, 1, 2, 3, 4]
    assert_same_run(tmp_path, folder)


def test_ctrl_c_twice_ends_at_once():
    guard = StopOnSignal()
    guard._note(signal.SIGTERM, None)
    guard._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        guard._note(signal.SIGINT, None)


@pytest.mark.parametrize("name", ["SIGTREM", "SIGKILL"])
def test_signals_that_cannot_be_caught(name):
    with pytest.raises(InputError, match=f"Unknown signal '{name}'"):
        StopOnSignal([name])


# A loss that is not finite


def test_a_loss_that_is_not_finite_ends_the_run_with_all_there_is_to_know(capsys, tmp_path):
    broken = ["+callbacks.poison._target_=helpers.Poison", "+callbacks.poison.batch=3"]
    command = [*TINY, *broken, f"output={tmp_path}", "trainer.max_steps=6"]
    command += ["trainer.accumulate_grad_batches=2", "callbacks.save_last.every_n_steps=1"]
    told = mistake(capsys, "train", *command)
    keys = (tmp_path / "keys.txt").read_text()
    assert keys.count(", ") == 1
    assert told == (
        f"The loss is nan at step 1, on the batch with the keys {keys}: expected a finite number, "
        "as with a lower model.optimizer.lr or trainer.precision=32-true; the last good checkpoint "
        f"is '{tmp_path}/checkpoints/last.ckpt', after 1 steps; go on with: python train.py "
        f"resume={tmp_path}"
    )
    assert last(tmp_path)["global_step"] == 1
    run("train", f"resume={tmp_path}", "+callbacks.poison.batch=-1", "trainer.max_steps=2")


def test_weights_that_are_not_finite_are_not_saved(capsys, tmp_path):
    """The step after a finite loss broke them: the next loss would be too late."""
    broken = ["+callbacks.poison._target_=helpers.Poison", "+callbacks.poison.batch=3"]
    command = [*TINY, *broken, "+callbacks.poison.weights=true", f"output={tmp_path}"]
    command += ["trainer.max_steps=6", "callbacks.save_last.every_n_steps=2"]
    told = mistake(capsys, "train", *command)
    assert told.startswith("The weights are not finite after step 3: expected finite gradients")
    assert "after 2 steps; go on with" in told
    assert last(tmp_path)["global_step"] == 2


# A full disk


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(capsys, tmp_path):
    full = ["+callbacks.full._target_=helpers.FullDisk", "+callbacks.full.step=2"]
    command = [*TINY, *full, f"output={tmp_path}", "trainer.max_steps=4"]
    told = mistake(capsys, "train", *command, "callbacks.save_last.every_n_steps=1")
    assert told.startswith(f"Cannot write '{tmp_path}/checkpoints/last.ckpt': File too large")
    assert last(tmp_path)["global_step"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    run("train", f"resume={tmp_path}", "+callbacks.full.step=-1", "trainer.max_steps=2")
