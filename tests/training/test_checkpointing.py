import logging

import lightning as L
import pytest
import torch
from helpers import FullDisk
from training.conftest import make_trainer, pictures

from featinv import InputError
from featinv.training.checkpointing import SaveLast


def test_checkpoints_are_saved_every_n_optimiser_steps_and_at_the_end(tiny_model, tmp_path):
    saves = []

    class Watched(SaveLast):
        def _save(self, trainer) -> None:
            saves.append(trainer.global_step)
            super()._save(trainer)

    path = tmp_path / "folder" / "last.ckpt"
    trainer = make_trainer(tmp_path, Watched(str(path), 2), max_steps=5, accumulate_grad_batches=2)
    trainer.fit(tiny_model, pictures(10))
    assert saves == [2, 4, 5]
    assert torch.load(path, weights_only=True)["global_step"] == 5
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


class CtrlC(L.Callback):
    """Interrupts training in its fourth batch."""

    def on_before_zero_grad(self, trainer, *args) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == 3:
            raise KeyboardInterrupt


def test_ctrl_c_within_a_step_keeps_the_previous_checkpoint(tiny_model, tmp_path, caplog):
    path = tmp_path / "last.ckpt"
    with pytest.raises(SystemExit), caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, CtrlC(), SaveLast(str(path), 2)).fit(tiny_model, pictures(4))
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert f"the last good checkpoint is '{path}', after 2 steps; go on with" in caplog.text


def test_a_full_disk_ends_the_run_and_keeps_the_previous_checkpoint(tiny_model, tmp_path):
    path = tmp_path / "folder" / "last.ckpt"
    trainer = make_trainer(tmp_path, FullDisk(2), SaveLast(str(path), 1))
    with pytest.raises(InputError, match=f"Cannot write '{path}': File too large"):
        trainer.fit(tiny_model, pictures(4))
    assert torch.load(path, weights_only=True)["global_step"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]
