import json

import pytest
import torch
from data.conftest import jpeg, write_shard
from helpers import run

from featinv.analysis.probe import Probe
from featinv.checkpoints import load_model
from featinv.explorer.session import Exploration


@pytest.fixture
def shards(tmp_path):
    """Two pictures, again and again: one of each class."""
    for name, number in (("train", 12), ("val", 6)):
        keys = [f"{name}-{i}" for i in range(number)]
        labels = {key: str(4 + i % 2) for i, key in enumerate(keys)}
        pictures = {key: jpeg(i % 2) for i, key in enumerate(keys)}
        write_shard(tmp_path / f"{name}-0000.tar", pictures, labels)
    few = ["data=imagenette", "data.batch_size=4", "data.num_workers=0", f"data.root={tmp_path}"]
    return ["data.train_shards=train-*.tar", "data.val_shards=val-*.tar", *few]


def test_probes_are_saved_with_their_accuracy(shards, tiny, experiment, tmp_path):
    checkpoint, output = tiny("spatial"), tmp_path / "probe"
    overrides = [*shards, "num_train_images=10", "data.min_scale=1"]
    rows = experiment("probe", f"checkpoint={checkpoint}", *overrides, output=output)
    numbers = json.loads((output / "metrics.json").read_text())
    backbone = load_model(checkpoint).backbone
    for row in rows:
        fitted = Probe.load(output / f"{row['probe']}.safetensors")
        fitted.attach(backbone)
        assert fitted.accuracy == numbers["accuracy"][row["probe"]]
        assert row["accuracy"] == f"{fitted.accuracy:.3f}"
        assert fitted.classes.tolist() == [4, 5]
        assert backbone.classify(torch.zeros(3, 3, 64, 64)).shape == (3, 1000)
    assert numbers["accuracy"]["logistic"] == 1  # the two pictures differ
    page = (output / "table.md").read_text()
    assert "fitted to 10 images of 2 classes, measured on 6 others" in page


def test_a_probe_gives_classes_to_an_encoder_without(shards, tiny, experiment, refusal, tmp_path):
    headless = tiny("headless")
    overrides = [f"checkpoint={headless}", *shards]
    experiment("probe", *overrides, "num_train_images=10", output=tmp_path / "probe")
    probe = tmp_path / "probe" / "logistic.safetensors"
    drawing = ["sampler.num_steps=2", "num_samples=1", "witnesses=[]", "num_pictures=1"]
    agreements = {}
    for name, more in (("without", []), ("with", [f"probe={probe}"])):
        run("evaluate", *overrides, *drawing, *more, f"output={tmp_path / name}")
        rows = json.loads((tmp_path / name / "metrics.json").read_text())["rows"]
        agreements[name] = rows["ceiling"].get("top1_agreement", {}).get("mean")
    assert agreements["without"] is None
    assert agreements["with"] == 1  # the two pictures do not change much
    said = refusal("concepts", *overrides)
    assert "has no classes, hence no logits: expected a probe" in said
    exploration = Exploration.load(str(headless), None, torch.device("cpu"), str(probe))
    assert exploration.model.backbone.classifies
    assert set(exploration.hashes) == {"checkpoint", "probe"}
