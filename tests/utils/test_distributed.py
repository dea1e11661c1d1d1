"""Two processes on one machine do what one does."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    RANKED,
    TWO_RANKS,
    assert_same_logs,
    assert_same_run,
    averaged,
    end,
    finish,
    last,
    logged,
    run,
    start,
)
from PIL import Image

from featinv.utils.distributed import gather, gather_objects, rank_and_world, share_rows


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of a run of two ranks with batches of 4."""
    folder = tmp_path_factory.mktemp("two")
    code, output = finish(start(*command(folder)))
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The folder of a run of one rank with batches of 8."""
    folder = tmp_path_factory.mktemp("one")
    run("train", *RANKED, "data.batch_size=8", f"output={folder}", *spy(folder))
    return folder


def command(folder: Path) -> list[str]:
    """The overrides of a run of two ranks with batches of 4."""
    return [*RANKED, *TWO_RANKS, "data.batch_size=4", f"output={folder}", *spy(folder)]


def spy(folder: Path) -> list[str]:
    return ["+callbacks.spy._target_=spy.Spy", f"+callbacks.spy.folder={folder}"]


def seen(folder: Path, rank: int = 0) -> dict:
    return torch.load(folder / f"spy-{rank}.pt", weights_only=True)


# Training


def test_the_gradient_of_two_ranks_is_that_of_one_with_twice_the_batch(one, two):
    first, second, whole = (seen(two, 0), seen(two, 1), seen(one))
    assert len(whole["gradients"]) == len(first["gradients"]) == len(second["gradients"]) == 6
    for step, gradients in enumerate(whole["gradients"]):
        assert len(gradients) > 100
        torch.testing.assert_close(first["gradients"][step], gradients, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            first["gradients"][step], second["gradients"][step], rtol=0, atol=0
        )
    # or the test would compare nothing
    assert max(float(g.abs().max()) for g in whole["gradients"][0].values()) > 0.01


def test_the_weights_and_the_logs_are_those_of_one_rank(one, two):
    torch.testing.assert_close(averaged(two), averaged(one), rtol=1e-4, atol=1e-6)
    assert last(two)["global_step"] == last(one)["global_step"] == 6
    names = ("train/loss", "val/loss", "val/feature_cosine", "val/feature_cosine_shuffled")
    assert_same_logs(two, one, *names, "lr-SGD")
    assert list(logged(two, "train/loss")) == [0, 1, 2, 3, 4, 5]


def test_every_rank_sees_other_samples(one, two):
    ranks = [seen(two, rank)["samples"] for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 6 * 2  # and equally many
    together = [first + second for first, second in zip(*ranks, strict=True)]
    assert together == seen(one)["samples"]
    assert sorted(sum(together, [])) == list(range(6 * 2 * 8))


def test_only_trained_weights_are_sent_from_rank_to_rank(two):
    for rank in (0, 1):
        names = seen(two, rank)
        assert {name.split(".")[0] for name in names["reduced"]} == {"unet", "controlnet"}
        assert {name.split(".")[0] for name in names["ignored"]} >= {"backbone", "codec"}
        assert names["buffers"] == [] and "backbone.model.bn1.running_mean" in names["ignored"]


# Validation and evaluation


def test_validation_images_that_do_not_divide_evenly(two):
    assert [seen(two, rank)["validated"] for rank in (0, 1)] == [[[0, 2], [0, 2]], [[1], [1]]]


def test_the_grids_are_those_of_one_rank(one, two):
    for name in ("step_0000003.png", "step_0000006.png"):
        with Image.open(one / "grids" / name) as first, Image.open(two / "grids" / name) as second:
            pixels = [torch.tensor(list(grid.getdata())) for grid in (first, second)]
        assert (pixels[0] - pixels[1]).abs().max() <= 2


def test_the_evaluation_is_that_of_one_rank(one, two):
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


def test_two_ranks_leave_one_run(one, two):
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (one, two)]
    assert names[1] - names[0] == {"spy-1.pt", "train_ddp_process_1.log"}
    assert names[0] <= names[1]


# Killed at any moment


def test_two_ranks_that_were_killed_go_on(tmp_path, two):
    process, deadline = start(*command(tmp_path), "resume=auto"), time.monotonic() + 120
    while process.poll() is None and 2 not in logged(tmp_path, "train/loss"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    end(process)
    process.communicate()
    assert 1 <= last(tmp_path)["global_step"] < 6
    # The second rank gets no image to validate on, and must not be waited for.
    code, output = finish(start(*command(tmp_path), "resume=auto", "data.num_val_images=1"))
    assert code == 0, output
    assert_same_run(tmp_path, two)
    assert logged(tmp_path, "train/loss") == logged(two, "train/loss")
    assert set(logged(tmp_path, "val/loss")) >= {5}


@pytest.mark.slow
def test_two_ranks_that_were_killed_again_and_again_go_on(tmp_path):
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


# Sharing work


def test_a_process_alone_does_everything():
    assert rank_and_world() == (0, 1)
    rows = torch.randn(5, 2)
    assert torch.equal(share_rows(lambda numbers: rows[numbers], 5), rows)
    assert gather(rows)[0] is rows and gather_objects("a") == ["a"]


def shares(rank: int, folder: str) -> None:
    """What one of three processes does."""
    store = torch.distributed.FileStore(f"{folder}/store", 3)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
    asked = []

    def compute(numbers) -> torch.Tensor:
        asked.append(list(numbers))
        return torch.tensor([[n, 10 * n] for n in numbers], dtype=torch.uint8)

    results = [share_rows(compute, number).tolist() for number in (1, 2, 7)]
    parts = [part.tolist() for part in gather(torch.arange(rank))]
    objects = gather_objects({"rank": rank})
    Path(folder, str(rank)).write_text(json.dumps([asked, results, parts, objects]))
    torch.distributed.destroy_process_group()


def test_rows_are_shared_however_many_there_are(tmp_path):
    torch.multiprocessing.start_processes(shares, (str(tmp_path),), nprocs=3, start_method="fork")
    for rank in range(3):
        asked, results, parts, objects = json.loads((tmp_path / str(rank)).read_text())
        assert results == [[[n, 10 * n] for n in range(number)] for number in (1, 2, 7)]
        assert asked[2] == list(range(rank, 7, 3))  # each does only its own
        assert parts == [[], [0], [0, 1]]
        assert objects == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
