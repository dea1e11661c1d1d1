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


def grids(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "grids").iterdir())


def test_a_run_stopped_twice_equals_an_uninterrupted_one(tmp_path):
    """Steps of two batches: by an error, and by a signal; then moved, with other values."""
    whole, first, moved = tmp_path / "whole", tmp_path / "first", tmp_path / "moved"
    overrides = [*TINY, *STEADY, "trainer.max_steps=5", "validate_every_n_steps=2"]
    overrides += ["trainer.accumulate_grad_batches=2", "evaluation.num_images=1"]
    overrides += ["callbacks.save_last.every_n_steps=1"]
    run("train", *overrides, f"output={whole}")
    assert grids(whole) == ["step_0000002.png", "step_0000004.png"]
    assert list(logged(whole, "val/loss")) == [1, 3]

    command = [*overrides, f"output={first}", "resume=auto"]
    boom = ["+callbacks.boom._target_=helpers.Boom", f"+callbacks.boom.marker={tmp_path}/boom"]
    with pytest.raises(RuntimeError, match="boom"):  # in the middle of the third step
        run("train", *command, *boom, "+callbacks.boom.batch=5")
    assert last(first)["global_step"] == 2
    sent = ["+callbacks.sent._target_=helpers.Signal", "+callbacks.sent.name=SIGTERM"]
    with pytest.raises(SystemExit) as end:  # in validation, with the averaged weights
        run("train", *command, *sent, "+callbacks.sent.batch=7", "+callbacks.sent.validation=true")
    assert (end.value.code, last(first)["global_step"]) == (128 + 15, 4)
    assert f"go on with the option resume={first}" in (first / "train.log").read_text()

    shutil.move(first, moved)
    run("train", f"resume={moved}", "evaluation.num_samples=1", "+trainer.max_time=00:01:00:00")
    assert not first.exists()
    assert steps_done(moved) == [0, 1, 2, 3, 4]
    assert_same_run(moved, whole)
    assert_same_logs(moved, whole, "train/loss", "val/loss", "val/feature_cosine", "lr-AdamW")
    assert grids(moved) == grids(whole)
    config = OmegaConf.load(moved / "config.yaml")
    assert (config.output, config.trainer.max_time) == (str(moved), "00:01:00:00")
    assert config.callbacks.save_last.path == str(moved / LAST)
    assert config.model.image_size == 32  # not the default, though not given on resuming
    assert json.loads((moved / "metrics.json").read_text())["num_samples"] == 1


def test_a_run_resumes_with_another_batch_size(tmp_path):
    """Every sample once, 13 in an epoch; interrupted in the second batch of the second step."""
    options = ["epochs=1", "trainer.accumulate_grad_batches=2", f"output={tmp_path}"]
    sent = ["+callbacks.sent._target_=helpers.Signal", "+callbacks.sent.name=SIGTERM"]
    with pytest.raises(SystemExit):
        run("train", *TINY, *options, *sent, "+callbacks.sent.batch=3")
    changed = ["data.batch_size=1", "trainer.accumulate_grad_batches=5", "evaluation.num_images=1"]
    spy = ["+callbacks.spy._target_=spy.Spy", f"+callbacks.spy.folder={tmp_path}"]
    run("train", f"resume={tmp_path}", "+callbacks.sent.batch=-1", *changed, *spy)
    seen = torch.load(tmp_path / "spy-0.pt", weights_only=True)
    assert seen["samples"] == [[number] for number in range(8, 13)]
    assert last(tmp_path)["global_step"] == 2 + 1


# Configs of resumed runs


def test_overrides_that_cannot_change_a_resumed_run():
    config = OmegaConf.create({"resume": str(tiny_run())})
    for override in ("data=photos", "seed=1", "~callbacks.ema"):
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


def test_a_missing_or_damaged_run_cannot_be_resumed(tmp_path):
    config = OmegaConf.create({"resume": str(tmp_path)})
    with pytest.raises(InputError, match=f"no run to resume in '{tmp_path}': expected"):
        load_resumed(config, [])
    shutil.copytree(tiny_run(), tmp_path, dirs_exist_ok=True)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:1000])
    with pytest.raises(InputError, match=f"The checkpoint '{tmp_path / LAST}' is damaged"):
        load_resumed(config, [])
    load_model(tmp_path)  # the averaged weights are intact


def test_a_command_with_other_values_does_not_resume_a_run(capsys):
    folder = tiny_run()
    before = (folder / "config.yaml").read_bytes()
    sentence = mistake(capsys, "train", *TINY, f"output={folder}", "resume=auto", "seed=1")
    assert sentence.startswith(f"seed is 1, but the run in '{folder}' was started with 0: expected")
    assert (folder / "config.yaml").read_bytes() == before


def test_a_new_run_removes_the_state_and_logs_of_the_previous_one(tmp_path):
    """Otherwise, if it ended early, it could be resumed as the old run."""
    shutil.copytree(tiny_run(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "wandb_id.txt").touch()
    config = OmegaConf.load(tmp_path / "config.yaml")
    config.output = str(tmp_path)
    prepare_folder(config)
    for name in (LAST, "metrics.jsonl", "wandb_id.txt"):
        assert not (tmp_path / name).exists()


def test_classes_of_an_earlier_versions_run_are_found(tmp_path):
    shutil.copytree(tiny_run(), tmp_path, dirs_exist_ok=True)
    old = Path(__file__).parents[1] / "saved_runs" / "v0.1" / "config.yaml"
    shutil.copy(old, tmp_path / "config.yaml")
    resumed = load_resumed(OmegaConf.create({"resume": str(tmp_path)}), [])
    for part in (*resumed.callbacks.values(), *resumed.logger.values(), resumed.data):
        assert callable(get_object(part["_target_"]))
