"""Packing class folders, and reading the shards back."""

import json
from itertools import count

import pytest
import webdataset as wds

from data.conftest import eval_batches, jpeg, keys_of
from featinv.cli.convert import main
from featinv.data import ShardsDataModule
from featinv.data.packer import pack


@pytest.fixture
def source(tmp_path):
    for c, name in enumerate(["cat", "dog.v2"]):
        (tmp_path / "source" / name).mkdir(parents=True)
        for i in range(4):
            path = tmp_path / "source" / name / f"my {i}.photo.jpg"
            path.write_bytes(jpeg(10 * c + i, size=(60, 40)))
    (tmp_path / "source" / "cat" / "bad.jpg").write_bytes(b"")
    return tmp_path / "source"


def test_round_trip(source, tmp_path):
    paths = pack(source, tmp_path / "out" / "pets", size=20, samples_per_shard=3)
    assert [path.name for path in paths] == [f"pets-000{i}.tar" for i in range(3)]
    assert json.loads((tmp_path / "out" / "pets-classes.json").read_text()) == {
        "0": "cat",
        "1": "dog.v2",
    }
    assert (
        sorted(p.name for p in (tmp_path / "out").iterdir())[0] == "pets-0000.tar"
    )  # no temporary folder
    module = ShardsDataModule(
        val_shards=str(tmp_path / "out" / "pets-*.tar"), image_size=8, batch_size=8
    )
    (batch,) = eval_batches(module)
    labels = dict(zip(batch["key"], batch["label"].tolist(), strict=True))
    assert len(labels) == 8
    assert all(label == ("dog" in key) for key, label in labels.items())
    assert sorted(keys_of([batch])) == keys_of([batch])  # numbered in their shuffled order
    assert len(set(batch["label"][:4].tolist())) == 2  # shuffled
    again = pack(source, tmp_path / "again" / "pets", size=20, samples_per_shard=3)
    assert [a.read_bytes() for a in again] == [p.read_bytes() for p in paths]


def test_an_interrupted_run_leaves_nothing(source, tmp_path, monkeypatch):
    write, calls = wds.TarWriter.write, count()

    def write_six(tar, sample):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return write(tar, sample)

    monkeypatch.setattr(wds.TarWriter, "write", write_six)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out" / "pets", samples_per_shard=3)
    assert next(calls) == 7 and list((tmp_path / "out").iterdir()) == []


def test_command_line(source, tmp_path, capfd, caplog):
    main(["pack", str(source), str(tmp_path / "pets")])
    output, errors = capfd.readouterr()
    assert "Wrote 1 shards" in output and "9/9" in errors and "img/s" in errors
    assert "Skipped 1 unreadable samples: cat/bad.jpg" in caplog.text
    for arguments, sentence in (
        ([source, tmp_path / "pets"], "pets-0000.tar' exists already"),
        ([tmp_path / "absent", tmp_path / "new"], "absent' does not exist"),
        ([source, tmp_path / "new", "--quality", 0], "quality is 0: expected 1 to 100"),
        ([source], "the following arguments are required: PREFIX"),
        ([source, "x", "--size", "big"], "invalid int value: 'big'"),
    ):
        with pytest.raises(SystemExit, match="^2$"):
            main(["pack", *map(str, arguments)])
        assert sentence in capfd.readouterr().err
