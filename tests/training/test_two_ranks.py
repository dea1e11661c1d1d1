"""Two processes on one machine do what one does."""

import io
import json
import os
import random
import signal
import socket
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from helpers import (
    RANKED,
    ROOT,
    TWO_RANKS,
    assert_same_logs,
    assert_same_run,
    averaged,
    finish,
    last,
    logged,
    run,
    start,
)
from omegaconf import OmegaConf
from PIL import Image
from torch.multiprocessing import ProcessContext, start_processes

pytestmark = pytest.mark.xdist_group("two ranks")  # one process: the fixtures take seconds

# The ranks that end early are forks of the tests' process, which has imported everything, with
# torchrun's variables. Lightning starts those of the sweep, and of the slow test.


def _rank(rank: int, port: int, folder: Path, jobs: list[list[str]]) -> None:
    """Be one of two ranks; write down each job's output and how it ended."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    for number, job in enumerate(jobs):
        code = 0
        output = folder / f"{number}-{rank}.txt"
        with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                run("train", *job)
            except SystemExit as end:
                code = end.code
            except BaseException:
                code = traceback.format_exc()
        output.with_suffix(".json").write_text(json.dumps(code))


def start_two(folder: Path, *jobs: list[str]) -> ProcessContext:
    """Start two ranks that do some jobs, one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"nprocs": 2, "join": False, "start_method": "fork"}
    return start_processes(_rank, (port, folder, jobs), **options)


def end_two(ranks: ProcessContext, timeout: float = 240) -> None:
    """Wait for two ranks, and kill them if they hang."""
    deadline = time.monotonic() + timeout
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in ranks.processes:
            process.kill()


def exit_codes(folder: Path, job: int) -> list:
    """Return the exit codes of both ranks of a job."""
    return [json.loads((folder / f"{job}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> tuple[Path, str]:
    """The folder and stderr of a sweep of one job on two ranks, under what looks like Slurm."""
    folder, stderr = tmp_path_factory.mktemp("sweep") / "ranks", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(stderr):
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # of the spy
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("SLURM_NTASKS", "1")  # one task of several ranks, as submitit asks for it
        overrides = [*BATCHES_OF_4, *spy(folder / "job"), "logger=wandb"]
        run("train", "-m", *overrides, f"output={folder}")
    return folder, stderr.getvalue()


@pytest.fixture(scope="module")
def two(sweep) -> Path:
    """The folder of a run of two ranks with batches of 4."""
    return sweep[0] / "job"


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The folder of a run of one rank with batches of 8."""
    folder = tmp_path_factory.mktemp("one")
    run("train", *RANKED, "data.batch_size=8", f"output={folder}", *spy(folder))
    return folder


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """The folder of two ranks' jobs, done one after the other by the same two processes.

    0: The second rank's loss is not finite in the second batch of a step, and checked two steps
    later. 1: The second rank receives a signal, of which the first hears when losses are checked.
    2: Job 1 is resumed, and the second rank validates no image.
    """
    folder = tmp_path_factory.mktemp("ranks")
    rarely = ["trainer.log_every_n_steps=3", "callbacks.save_last.every_n_steps=50"]
    rarely += ["validate_every_n_steps=4", "evaluation.num_images=1"]
    poison = ["+callbacks.poison._target_=helpers.Poison", "+callbacks.poison.rank=1"]
    sent = ["+callbacks.sent._target_=helpers.Signal", "+callbacks.sent.rank=1"]
    jobs = [
        [*command(folder / "broken"), *rarely, *poison, "+callbacks.poison.batch=1"],
        [
            *(*command(folder / "signal"), *rarely, *sent),
            *("+callbacks.sent.name=SIGUSR1", "+callbacks.sent.batch=2"),
        ],
        [f"resume={folder / 'signal'}", "+callbacks.sent.batch=-1", "data.num_val_images=1"],
    ]
    end_two(start_two(folder, *jobs))
    return folder


BATCHES_OF_4 = [*RANKED, *TWO_RANKS, "data.batch_size=4"]


def command(folder: Path) -> list[str]:
    """The overrides of a run of two ranks with batches of 4."""
    return [*BATCHES_OF_4, f"output={folder}", *spy(folder)]


def spy(folder: Path) -> list[str]:
    return ["+callbacks.spy._target_=spy.Spy", f"+callbacks.spy.folder={folder}"]


def seen(folder: Path, rank: int = 0) -> dict:
    return torch.load(folder / f"spy-{rank}.pt", weights_only=True)


# Training


def test_the_gradient_of_two_ranks_is_that_of_one_with_twice_the_batch(one, two):
    first, second, whole = (seen(two, 0), seen(two, 1), seen(one))
    assert len(whole["gradients"]) == len(first["gradients"]) == len(second["gradients"]) == 4
    for step, gradients in enumerate(whole["gradients"]):
        assert len(gradients) > 100
        torch.testing.assert_close(first["gradients"][step], gradients, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            first["gradients"][step], second["gradients"][step], rtol=0, atol=0
        )
    # or the test would compare nothing
    assert max(float(g.abs().max()) for g in whole["gradients"][0].values()) > 0.01


def test_weights_and_logs_match_those_of_one_rank(one, two):
    torch.testing.assert_close(averaged(two), averaged(one), rtol=1e-4, atol=1e-6)
    assert last(two)["global_step"] == last(one)["global_step"] == 4
    names = ("train/loss", "val/loss", "val/feature_cosine", "val/feature_cosine_shuffled")
    assert_same_logs(two, one, *names, "lr-SGD")
    assert list(logged(two, "train/loss")) == [0, 1, 2, 3]


def test_no_two_ranks_see_the_same_samples(one, two):
    ranks = [seen(two, rank)["samples"] for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 4 * 2  # and equally many
    together = [first + second for first, second in zip(*ranks, strict=True)]
    assert together == seen(one)["samples"]
    assert sorted(sum(together, [])) == list(range(4 * 2 * 8))


def test_only_trained_weights_are_sent_from_rank_to_rank(two):
    for rank in (0, 1):
        names = seen(two, rank)
        parts = {name.split(".")[0] for name in names["reduced"]}
        assert parts == {"unet", "controlnet", "feature_encoder"}
        assert {name.split(".")[0] for name in names["ignored"]} >= {"backbone", "codec"}
        assert names["buffers"] == [] and "backbone.model.bn1.running_mean" in names["ignored"]


# Validation and evaluation


def test_validation_images_need_not_divide_evenly(two):
    assert [seen(two, rank)["validated"] for rank in (0, 1)] == [[[0, 2], [0, 2]], [[1], [1]]]


def test_the_grids_match_those_of_one_rank(one, two):
    for name in ("step_0000002.png", "step_0000004.png"):
        with Image.open(one / "grids" / name) as first, Image.open(two / "grids" / name) as second:
            pixels = [torch.tensor(list(grid.getdata())) for grid in (first, second)]
        assert (pixels[0] - pixels[1]).abs().max() <= 2


def test_the_evaluation_matches_that_of_one_rank(one, two):
    """Nine images in batches of four: the last one leaves a rank with nothing to draw."""
    rows = [json.loads((folder / "metrics.json").read_text())["rows"] for folder in (one, two)]
    own, other = {"ceiling", "codec", "reconstruction", "best"}, {"shuffled", "floor"}
    assert set(rows[0]) == own | other
    for row, metrics in rows[0].items():
        for metric, values in metrics.items():
            assert rows[1][row][metric] == pytest.approx(values, abs=1e-3), (row, metric)
    tables = [(folder / "per_image.csv").read_text().splitlines() for folder in (one, two)]
    keys = [[line.split(",")[:2] for line in table] for table in tables]
    assert keys[0] == keys[1] and len(keys[0]) == 1 + 9
    assert "9 images of 3 photographs, 2 samples each" in (two / "table.md").read_text()


# A job of a sweep, whose second rank Lightning starts by repeating the command


def test_a_job_on_two_ranks_is_one_run(sweep, one, two):
    folder, stderr = sweep
    assert {path.name for path in folder.iterdir()} == {"job", "jobs.md", "multirun.yaml"}
    assert "| finished" in (folder / "jobs.md").read_text()
    assert not (ROOT / "multirun").exists()
    names = [{str(p.relative_to(run)) for p in run.rglob("*")} for run in (one, two)]
    own = {name for name in names[1] if not name.startswith("wandb")}
    assert own == names[0] | {"spy-1.pt", "job.json", "train_ddp_process_1.log"}
    assert len(list(two.glob("wandb/offline-run-*"))) == 1
    config = OmegaConf.load(two / "config.yaml")
    assert (config.output, config.trainer.devices) == (str(two), 2)
    assert (config.logger.wandb.group, config.logger.wandb.name) == ("ranks", "job")
    lines = [line.split("\r")[-1] for line in stderr.splitlines()]
    known = ("evaluate:", "wandb:", "Epoch")
    assert [line for line in lines if line.strip() and not line.startswith(known)] == []


# Ended


def test_a_loss_of_one_rank_that_is_not_finite_ends_both(ended):
    assert exit_codes(ended, 0) == [2, 0]
    keys = (ended / "broken" / "keys.txt").read_text()  # of the second rank's batch
    error = (
        f"Error: The loss is nan at step 0, on the batch with the keys {keys}: expected a finite"
    )
    assert error in (ended / "0-0.txt").read_text()
    assert "Error" not in (ended / "0-1.txt").read_text()
    assert not (ended / "broken" / "checkpoints" / "last.ckpt").exists()


def test_a_signal_to_one_rank_saves_and_ends_both(ended, two):
    """Lightning would take another exit code of the second rank for a failure."""
    assert exit_codes(ended, 1) == [128 + signal.SIGUSR1, 0]
    output = (ended / "1-0.txt").read_text()
    assert "after 3 steps; go on with the option resume=" in output
    assert exit_codes(ended, 2) == [0, 0]
    assert_same_run(ended / "signal", two)


@pytest.mark.slow
def test_two_ranks_resume_after_every_kill(tmp_path):
    long = ["trainer.max_steps=60"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = finish(start(*command(whole), *long))
    assert code == 0, output
    moments = random.Random(0)
    for _ in range(6):
        process = start(*command(killed), *long, "resume=auto")
        time.sleep(moments.uniform(15, 40))
        # The first rank alone gets it: the second must neither hang nor be left behind.
        process.send_signal(moments.choice([signal.SIGKILL, signal.SIGTERM]))
        code, output = finish(process)
        # Where it is not in training there is nothing to save: SIGTERM ends it as any command.
        assert code in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM), output
    code, output = finish(start(*command(killed), *long, "resume=auto"))
    assert code == 0, output
    assert_same_run(killed, whole)
    assert logged(killed, "train/loss") == logged(whole, "train/loss")
