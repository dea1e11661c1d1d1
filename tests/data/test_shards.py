"""Shards: deterministic, resumable training streams and exact evaluation, damaged tars included."""

import functools
import http.server
import logging
import socketserver
import threading

import pytest
import torch
from huggingface_hub import HfFileSystem

from data.conftest import (
    eval_batches,
    indices_of,
    jpeg,
    keys_of,
    make_shards,
    train_batches,
    write_shard,
)
from featinv.data import ShardsDataModule, tars
from featinv.data.base import Broken
from featinv.data.tars import expand_shards, read_shard
from featinv.utils.errors import InputError


def module_of(root, **options):
    defaults = {"image_size": 8, "batch_size": 3, "seed": 1, "shuffle_buffer": 8}
    return ShardsDataModule(root=root, **defaults | options)


def trainer_of(root, **options):
    return module_of(root, train_shards="train-*.tar", **options)


def test_ranks_and_workers_share_one_pass(tmp_path):
    keys = make_shards(tmp_path, "train", [6, 6, 6, 6])
    module = trainer_of(tmp_path, num_workers=2)
    ranks = [train_batches(module, 4, rank, world=2) for rank in (0, 1)]
    seen = [*ranks[0], *ranks[1]]
    assert sorted(keys_of(seen)[:24]) == sorted(keys)  # every sample once in the first pass
    assert len(set(indices_of(seen))) == 24
    assert keys_of(train_batches(trainer_of(tmp_path, seed=2), 3)) != keys_of(
        train_batches(trainer_of(tmp_path), 3)
    )


def test_evaluation_is_exact(tmp_path):
    world = 3
    keys = make_shards(tmp_path, "val", [5, 1, 9, 4])
    module = module_of(tmp_path, val_shards="val-{0000..0003}.tar", num_workers=1)
    ranks = [eval_batches(module, rank, world) for rank in range(world)]
    for rank, batches in enumerate(ranks):
        assert indices_of(batches) == list(range(rank, 19, world))
        assert keys_of(batches) == keys[rank::world]
    limited = [i for rank in range(world) for i in indices_of(eval_batches(module, rank, world, 7))]
    assert sorted(limited) == list(range(7))


def test_per_class_reads_no_further_than_needed(tmp_path):
    world = 2
    labels = torch.randint(5, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    for shard in range(8):
        here = {str(n): str(labels[n]) for n in range(10 * shard, 10 * shard + 10)}
        samples = {key: jpeg(int(key)) for key in here}
        write_shard(tmp_path / f"val-{shard}.tar", samples, here)
    expected = [n for n in range(80) if labels[:n].count(labels[n]) < 3]
    options = {"val_shards": "val-*.tar", "num_workers": 2, "per_class": 3}
    whole = eval_batches(module_of(tmp_path, **options))
    assert keys_of(whole) == [str(n) for n in expected] and expected != list(range(15))
    module = module_of(tmp_path, **options, num_classes=5)
    for shard in range(expected[-1] // 10 + 1, 8):
        (tmp_path / f"val-{shard}.tar").unlink()
    ranks = [eval_batches(module, rank, world) for rank in range(world)]
    by_index = {i: k for b in ranks for i, k in zip(indices_of(b), keys_of(b), strict=True)}
    assert [by_index[i] for i in range(15)] == [str(n) for n in expected]
    assert keys_of(eval_batches(module, limit=4)) == [str(n) for n in expected[:4]]


def test_more_workers_than_shards_is_an_error(tmp_path):
    make_shards(tmp_path, "train", [2, 2, 2])
    module = trainer_of(tmp_path, num_workers=2)
    assert len(train_batches(module, 1)) == 1
    with pytest.raises(InputError, match="2 ranks x 2 workers need 4 .*only 3: set num_workers to"):
        train_batches(module, 1, world=2)
    with pytest.raises(InputError, match="only 3: repack into more shards"):  # at any num_workers
        train_batches(module, 1, world=4)


def test_labels_are_parsed_and_may_be_missing(tmp_path):
    write_shard(tmp_path / "val-0.tar", {"a": jpeg(0)}, label="217\n")
    write_shard(tmp_path / "val-1.tar", {"b": jpeg(0)}, label=None)
    (batch,) = eval_batches(module_of(tmp_path, val_shards="val-*.tar"))
    assert batch["label"].tolist() == [217, -1] and batch["label"].dtype == torch.int64
    assert batch["image"].dtype == torch.uint8 and batch["key"] == ["a", "b"]


def test_every_truncation_is_detected(tmp_path):
    make_shards(tmp_path, "val", [2])
    path = tmp_path / "val-0000.tar"
    whole = path.read_bytes()
    size = len(whole.rstrip(b"\0"))
    for length in range(0, size, 256):  # through headers, contents and the seams between members
        path.write_bytes(whole[:length])
        assert isinstance(list(read_shard(str(path)))[-1], Broken), length
    path.write_bytes(whole)
    assert [record["__key__"] for record in read_shard(str(path))] == ["val-0-0", "val-0-1"]


def test_few_broken_samples_are_skipped_and_named(tmp_path, caplog):
    make_shards(tmp_path, "val", [40, 45])
    write_shard(tmp_path / "val-0001b.tar", {"empty": b"", "fine": jpeg(0)})
    cut = tmp_path / "val-0001.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size - 20_000])
    module = module_of(tmp_path, val_shards="val-*.tar", num_workers=2)
    with caplog.at_level(logging.WARNING):
        batches = eval_batches(module)
    assert "fine" in keys_of(batches) and "empty" not in keys_of(batches)
    assert "Skipped 2 unreadable samples" in caplog.text
    assert "val-0001.tar" in caplog.text and "empty" in caplog.text
    assert 60 < len(keys_of(batches)) < 84
    two = [eval_batches(module, rank, 2) for rank in (0, 1)]
    assert sorted(keys_of(two[0] + two[1])) == sorted(keys_of(batches))


def test_broken_training_samples_are_left_out(tmp_path, caplog):
    keys = make_shards(tmp_path, "train", [50])
    write_shard(tmp_path / "train-0001.tar", {"empty": b""})
    whole = train_batches(trainer_of(tmp_path), 30)
    assert [len(batch["key"]) for batch in whole] == [3] * 30
    assert sorted(keys_of(whole)[:50]) == sorted(keys) and indices_of(whole) == list(range(90))
    assert "Skipped 1 unreadable samples: empty" in caplog.text


def test_too_many_broken_samples_are_an_error(tmp_path):
    write_shard(tmp_path / "val-0.tar", {f"bad{i}": b"" for i in range(3)})
    make_shards(tmp_path, "val", [30])
    for workers in (0, 2):
        module = module_of(tmp_path, val_shards="val-*.tar", num_workers=workers)
        with pytest.raises(InputError, match="^3 of 33 samples cannot be read, more than 5%: bad0"):
            eval_batches(module)
    module = module_of(tmp_path, train_shards="val-0.tar")
    with pytest.raises(InputError, match="^16 samples in a row cannot be read"):
        train_batches(module, 1)
    write_shard(tmp_path / "train-0.tar", {})
    with pytest.raises(InputError, match="^No samples in .*train-0.tar"):
        train_batches(trainer_of(tmp_path), 1)  # and no endless search


def test_patterns(tmp_path):
    make_shards(tmp_path, "val", [1, 1, 1])
    names = [f"{tmp_path}/val-000{i}.tar" for i in range(3)]
    assert expand_shards("val-*.tar", str(tmp_path)) == names
    assert expand_shards(["val-{0001..0002}.tar", names[0]], str(tmp_path)) == names[1:] + names[:1]
    assert expand_shards("{a,b}.tar", "https://host/x/") == [
        "https://host/x/a.tar",
        "https://host/x/b.tar",
    ]
    assert expand_shards("http://host/{0..1}.tar") == ["http://host/0.tar", "http://host/1.tar"]
    for pattern, sentence in {
        "pipe:cat x": "'pipe:cat x' cannot be read: expected local paths, http",
        "s3://bucket/x.tar": "'s3://bucket/x.tar' cannot be read",
        "test-*.tar": r"no file matches .*/test-\*.tar; folder .*holds val-0000.tar, val-0001.tar",
        "val-{0000..0009}.tar": "no file matches .*/val-0003.tar and 6 more; folder ",
        "no/where/*.tar": "nearest existing folder, .*holds val-0000.tar",
    }.items():
        with pytest.raises(InputError, match=sentence):
            expand_shards(pattern, str(tmp_path))
    with pytest.raises(InputError, match="train_shards is empty"):
        train_batches(module_of(tmp_path), 1)
    with pytest.raises(InputError, match="val_shards is empty"):
        eval_batches(module_of(tmp_path))


def test_shards_on_the_hub(tmp_path, monkeypatch):
    folder = tmp_path / "datasets/somebody/birds"
    folder.mkdir(parents=True)
    keys = make_shards(folder, "birds", [3])
    monkeypatch.setattr(tars, "reachable", lambda: True)

    def open_on_hub(self, path, mode, block_size):
        return (tmp_path / path.removeprefix("hf://")).open(mode)

    monkeypatch.setattr(HfFileSystem, "open", open_on_hub)
    root = "hf://datasets/somebody/birds"
    assert keys_of(eval_batches(module_of(root, val_shards="birds-{0000..0000}.tar"))) == keys
    with pytest.raises(InputError, match="Cannot open shard 'hf://.*birds-0001.tar'"):
        eval_batches(module_of(root, val_shards="birds-0001.tar"))
    monkeypatch.setattr(tars, "reachable", lambda: False)
    module = module_of(root, val_shards="birds-0000.tar", num_workers=1)
    with pytest.raises(
        InputError,
        match="^The hub .* cannot be reached .* and shard '.*birds-0000.tar' cannot be opened",
    ):
        eval_batches(module)


def test_the_size_of_an_epoch_must_be_given(tmp_path):
    make_shards(tmp_path, "train", [2])
    assert trainer_of(tmp_path, num_train_images=2).epoch_size() == 2
    with pytest.raises(InputError, match="The number of training images is not known: set data.n"):
        trainer_of(tmp_path).epoch_size()


def test_shards_over_http(tmp_path, monkeypatch):
    keys = make_shards(tmp_path, "val", [2, 2])
    monkeypatch.setattr(tars, "RETRY_PAUSES", (0, None))
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    handler = functools.partial(quiet, directory=str(tmp_path))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_address[1]}"
        module = module_of(root, val_shards="val-000{0,1}.tar")
        assert keys_of(eval_batches(module)) == keys
        with pytest.raises(InputError, match="Cannot open shard 'http.*gone.tar': HTTP Error 404"):
            eval_batches(module_of(root, val_shards="gone.tar"))
        server.shutdown()
    with pytest.raises(InputError, match="Cannot open shard"):
        eval_batches(module)
