import os
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, Poison, Waits, run
from training.conftest import make_trainer, pictures

from featinv import InputError
from featinv.training.checkpointing import Interruption, SaveLast
from featinv.training.guards import Guard

# Waits for the GPU


def test_only_logged_steps_wait_for_the_gpu(tmp_path):
    """All callbacks of a run's config are there: average, progress bar, learning rate, ..."""
    often = ["trainer.log_every_n_steps=4", "trainer.max_steps=8", "validate_every_n_steps=6"]
    # The loading of images asks tensors too, on the CPU: it does so in another process.
    counting = ["data.num_workers=1", "+callbacks.waits._target_=helpers.Waits"]
    run("train", *TINY, *often, *counting, f"output={tmp_path}", "evaluation.num_images=1")
    assert Waits.steps == {4, 6, 8}


def test_a_training_step_leaves_everything_on_its_device(tiny_model, monkeypatch):
    """On a device without values, which raises an error if it is asked for one."""
    blocking, to = [], torch.Tensor.to

    def noting(tensor, *args, **options):
        moved = to(tensor, *args, **options)
        blocking.append(moved.device != tensor.device and not options.get("non_blocking"))
        return moved

    model = tiny_model.to("meta")
    monkeypatch.setattr(torch.Tensor, "to", noting)
    image = torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device="meta")
    loss = model.training_step({"image": image, "index": torch.tensor([0, 1])}, 0)
    loss.backward()
    assert loss.device.type == "meta" and blocking and not any(blocking)


# A loss that is not finite


def test_a_loss_that_is_not_finite_ends_the_run(tiny_model, tmp_path):
    """It is found before a checkpoint, steps later; the message says where it began."""
    save = SaveLast(str(tmp_path / "last.ckpt"), 2)
    trainer = make_trainer(
        *(tmp_path, Guard(), Poison(5), save),
        **{"max_steps": 6, "accumulate_grad_batches": 2, "log_every_n_steps": 50},
    )
    with pytest.raises(InputError) as error:
        trainer.fit(tiny_model, pictures(12))
    assert str(error.value) == (
        "The loss is nan at step 2, on the batch with the keys picture-5: expected a finite "
        "number, as with a lower model.optimizer.lr or trainer.precision=32-true; the last good "
        f"checkpoint is '{tmp_path}/last.ckpt', after 2 steps; go on with the option "
        f"resume={tmp_path}"
    )
    assert trainer.global_step == 4
    assert torch.load(save.path, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(
    "options", [{"log_every_n_steps": 3}, {"val_check_interval": 3}, {"max_steps": 3}]
)
def test_the_loss_is_checked_when_logged_before_a_validation_and_at_the_end(
    tiny_model, tmp_path, options
):
    trainer = make_trainer(tmp_path, Guard(), Poison(1), **{"max_steps": 6} | options)
    with pytest.raises(InputError, match="nan at step 1, on the batch with the keys picture-1:"):
        trainer.fit(tiny_model, pictures(6), pictures(1))
    assert trainer.global_step == 3


def test_weights_that_are_not_finite_are_not_saved(tiny_model, tmp_path):
    """The step after a finite loss broke them: the next loss would be too late."""
    save = SaveLast(str(tmp_path / "last.ckpt"), 2)
    trainer = make_trainer(tmp_path, Guard(), Poison(3, weights=True), save)
    sentence = "The weights are not finite after step 3: expected finite gradients"
    with pytest.raises(InputError, match=f"{sentence}.*after 2 steps; go on with"):
        trainer.fit(tiny_model, pictures(4))
    assert torch.load(save.path, weights_only=True)["global_step"] == 2


def test_the_logged_loss_is_the_mean_of_the_whole_step(tiny_model, tmp_path):
    """Two batches make a step; what is logged is the mean of the second step's."""
    means, losses = [], tiny_model.losses

    def noted(*args):
        result = losses(*args)
        means.append(float(result.detach().mean()))
        return result

    tiny_model.losses = noted
    options = {"max_steps": 2, "accumulate_grad_batches": 2, "log_every_n_steps": 2}
    trainer = make_trainer(tmp_path, Guard(), **options)
    trainer.fit(tiny_model, pictures(4))
    logged = float(trainer.callback_metrics["train/loss"])
    assert logged == pytest.approx((means[2] + means[3]) / 2)


# Signals


@pytest.fixture
def trainer(monkeypatch):
    """A stand-in for a trainer on one device, in steps of two batches."""
    handlers = {number: signal.getsignal(number) for number in signal.Signals}
    loops = SimpleNamespace(epoch_loop=SimpleNamespace())
    values = {"world_size": 1, "is_global_zero": True, "global_step": 3}
    yield SimpleNamespace(fit_loop=loops, accumulate_grad_batches=2, **values)
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def test_a_signal_ends_a_run_between_two_steps(trainer):
    guard, name = Guard(), "SIGUSR1"
    guard.on_train_start(trainer, None)
    guard.on_train_batch_start(trainer, None, {}, 6)
    os.kill(os.getpid(), signal.Signals[name])
    guard.on_train_batch_start(trainer, None, {}, 7)  # the second batch of a step
    ends = (lambda: guard.on_train_batch_start(trainer, None, {}, 8)), guard.on_fit_end
    for end, arguments in zip(ends, ((), (trainer, None)), strict=True):
        with pytest.raises(Interruption) as interruption:
            end(*arguments)
        assert interruption.value.code == 128 + signal.Signals[name]


def test_ctrl_c_twice_ends_at_once(trainer):
    guard = Guard()
    guard.on_train_start(trainer, None)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_cannot_be_caught():
    with pytest.raises(InputError, match="Unknown signal 'SIGKILL'"):
        Guard(["SIGKILL"])
