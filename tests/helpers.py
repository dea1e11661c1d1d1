"""What the tests of the entry points share: tiny runs, made in this process."""

import inspect
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # train.py and evaluate.py are no package

import evaluate  # noqa: E402
import train  # noqa: E402
from featinv.cli.app import run_entry_point  # noqa: E402
from featinv.training.loggers import read_history  # noqa: E402

TASKS = {"train": train.main, "evaluate": evaluate.main}

# A run of about a second.
TINY_CODEC = ["model.image_size=32", "model.codec.num_components=4"]
TINY_UNET = [
    "model.unet.sample_size=4",
    "model.unet.block_out_channels=[32,32]",
    "model.unet.down_block_types=[DownBlock2D,AttnDownBlock2D]",
    "model.unet.up_block_types=[AttnUpBlock2D,UpBlock2D]",
    "model.unet.attention_head_dim=16",
]
TINY_RUN = [
    "backbone=resnet10t_random",
    *TINY_CODEC,
    "model.hidden_channels=16",
    "data=photos",
    "data.batch_size=2",
    "data.crops_per_photo=1",
    "data.num_val_images=3",
    "sampler.num_steps=2",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "evaluation.num_samples=2",
    "evaluation.num_pictures=2",
    "evaluation.witnesses=[]",
    "callbacks.sample_grid.num_images=2",
    "callbacks.sample_grid.num_steps=2",
]
TINY = TINY_RUN + TINY_UNET


def run(name: str, *overrides: object, task=None) -> None:
    """Call an entry point as its command would, and leave the process as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    interrupt = signal.getsignal(signal.SIGINT)  # Lightning ignores it after an interruption
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("HYDRA_FULL_ERROR", "0")
        script = inspect.getfile(task) if inspect.isfunction(task) else str(ROOT / f"{name}.py")
        task = task or TASKS[name]
        patch.setattr(sys, "argv", [script, *map(str, overrides)])
        GlobalHydra.instance().clear()
        try:
            run_entry_point(task, name)
        finally:
            GlobalHydra.instance().clear()
            signal.signal(signal.SIGINT, interrupt)
            for handler in set(root.handlers) - set(handlers):
                handler.close()
            root.handlers, root.level = handlers, level


def mistake(capsys, name: str, *overrides: object, task=None) -> str:
    """Return the sentence with which an entry point ends; it must be all that it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(name, *overrides, task=task)
    assert end.value.code == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if "Error" in line]
    assert len(lines) == 1 and lines[0].startswith("Error: "), stderr
    return lines[0].removeprefix("Error: ")


# A schedule that does not depend on max_steps, and changes large enough to be seen.
STEADY = ["model.lr_schedule=constant", "callbacks.ema.decay=0.5"]


def averaged(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_run(folder: Path, other: Path) -> None:
    """Assert that averaged weights, training weights and optimiser of two runs are equal."""
    torch.testing.assert_close(averaged(folder), averaged(other), rtol=0, atol=1e-6)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(last(folder)[part], last(other)[part], rtol=0, atol=1e-6)
    assert last(folder)["global_step"] == last(other)["global_step"]


def steps_done(folder: Path) -> list[int]:
    """Return the steps whose loss was logged, those that were done again twice."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "train/loss" in line]


def logged(folder: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_history(folder) if name in row}


def assert_same_logs(folder: Path, other: Path, *names: str) -> None:
    for name in names:
        assert logged(folder, name) == pytest.approx(logged(other, name), abs=1e-5), name


KEEP: list[tempfile.TemporaryDirectory] = []  # until the tests end


@cache
def tiny_run(*overrides: str) -> Path:
    """Return the folder of a finished tiny run, trained once for all tests; not to be changed."""
    KEEP.append(tempfile.TemporaryDirectory(prefix="featinv-test-"))
    folder = Path(KEEP[-1].name) / "run"
    run("train", *TINY, f"output={folder}", *overrides)
    return folder


class Boom(L.Callback):
    """Ends training by an error, once: before batch `batch`."""

    def __init__(self, batch: int, marker: str) -> None:
        self.batch, self.marker = batch, Path(marker)

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch and not self.marker.exists():
            self.marker.touch()
            raise RuntimeError("boom")


class Signal(L.Callback):
    """Sends a signal to a rank in a batch, or in the validation after it."""

    def __init__(self, name: str, batch: int, validation: bool = False, rank: int = 0) -> None:
        self.number, self.batch = signal.Signals[name], batch
        self.validation, self.rank = validation, rank

    def on_before_backward(self, trainer, *args) -> None:
        self._send(trainer, validation=False)

    def on_validation_batch_end(self, trainer, *args) -> None:
        self._send(trainer, validation=True)

    def _send(self, trainer, validation: bool) -> None:
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        here = (batch, validation, trainer.global_rank)
        if here == (self.batch, self.validation, self.rank):
            os.kill(os.getpid(), self.number)


class Waits(L.Callback):
    """Notes the steps in which anything asks a tensor for its values: a GPU would be waited for.

    Left out is what is on the CPU in any case: the numbers of samples, which seed generators, and
    what a callback logs.
    """

    METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
    steps: set[int] = set()  # numbers of steps that were done by then

    def __init__(self) -> None:
        Waits.steps = set()
        self.counting = False

    def on_train_start(self, trainer, model) -> None:
        self.patch = pytest.MonkeyPatch()
        for name in self.METHODS:
            method = getattr(torch.Tensor, name)
            self.patch.setattr(torch.Tensor, name, self._noting(trainer, method))

    def _noting(self, trainer, method):
        def call(tensor, *args, **options):
            if self.counting:
                results = trainer._results.items()
                logged = [r.value for key, r in results if key.startswith("on_train_batch_end.")]
                if tensor.data_ptr() not in [t.data_ptr() for t in (self.index, *logged)]:
                    Waits.steps.add(trainer.global_step)
            return method(tensor, *args, **options)

        return call

    def on_train_batch_start(self, trainer, model, batch, *args) -> None:
        self.counting, self.index = True, batch["index"]

    def on_validation_start(self, *args) -> None:
        self.counting = False

    def on_train_end(self, *args) -> None:
        self.patch.undo()

    on_exception = on_train_end


class Poison(L.Callback):
    """Makes the loss of a rank's batch, or the weights after it, nan; writes down its keys."""

    def __init__(self, batch: int, weights: bool = False, rank: int = 0) -> None:
        self.batch, self.weights, self.rank = batch, weights, rank

    def on_train_batch_start(self, trainer, model, batch, *args) -> None:
        this = trainer.global_rank == self.rank
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch and this:
            keys = ", ".join(batch["key"])
            Path(trainer.default_root_dir, "keys.txt").write_text(keys)
            if not self.weights:
                losses = model.losses
                model.losses = lambda *args, **options: losses(*args, **options) * float("nan")

    def on_before_zero_grad(self, trainer, model, *args) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch and self.weights:
            model.unet.conv_in.bias.data[0] = float("nan")


class FullDisk(L.Callback):
    """Lets no file grow beyond a megabyte from a step on, until training ends."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, self.before[1]))

    def on_exception(self, *args) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


ROOT = Path(__file__).parents[1]
# Two processes on one CPU, batches of two micro batches, weights and optimiser that have a memory;
# no Adam, which turns rounding errors into steps.
TWO_RANKS = ["trainer=ddp", "trainer.devices=2"]
RANKED = [
    *TINY,
    *STEADY,
    "model.optimizer._target_=torch.optim.SGD",
    "+model.optimizer.momentum=0.9",
    "trainer.accumulate_grad_batches=2",
    "trainer.max_steps=4",
    "validate_every_n_steps=2",
    "callbacks.save_last.every_n_steps=1",
    "data.crops_per_photo=3",  # 9 images to evaluate on
    "data.num_val_images=3",
    "callbacks.sample_grid.num_images=3",
]


def start(*overrides: object, **options: object) -> subprocess.Popen:
    """Start `train.py` as a command, in a process group of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, overrides)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        start_new_session=True,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Return exit code and output of a command; nothing of it is left behind."""
    try:
        output, _ = process.communicate(timeout=180)
        return process.returncode, output
    finally:
        end(process)


def end(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Send a signal to a command and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
