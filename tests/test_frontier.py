import csv

import pytest
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import frontier
from featinv.distributions import Judge

DATA = ["data=photos", "data.crops_per_photo=2", "num_images=6", "judges=[lite0]"]
FEW = ["scales=[0.05]", "iterations=[1,2]", "guided_steps=[null,1]"]


def test_plain_guided_and_hybrid_stand_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "num_features", 3)  # six images are enough
    look = Judge.__call__
    monkeypatch.setattr(Judge, "__call__", lambda judge, images: look(judge, images)[:, :3])
    prior = f"prior={tiny_run('conditioning=none')}"
    overrides = [f"checkpoint={tiny_run()}", prior, *DATA, *FEW, f"output={tmp_path}"]
    run("frontier", *overrides, task=frontier.main)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["plain"] + ["hybrid"] * 4 + ["training-free"] * 4
    assert [row["guided steps"] for row in rows[:5]] == ["0", "2", "1", "2", "1"]
    cosine = [float(row["spatial cosine"].split()[0]) for row in rows]
    assert cosine[3] > cosine[1] > cosine[0], "more guidance, nearer features"
    assert all(float(row["fd_lite0"]) >= 0 for row in rows)
    with Image.open(tmp_path / "frontier_lite0.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**7)) > 10
    # again: nothing is computed anew
    made = (tmp_path / "plain" / "metrics.json").stat().st_mtime_ns
    run("frontier", *overrides, task=frontier.main)
    assert (tmp_path / "plain" / "metrics.json").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("scales=[-1]", "sampler.feature_guidance_scale is -1.0, expected 0 or more"),
        ("prior=nothing", "There is no checkpoint 'nothing'"),
    ],
)
def test_bad_input(override, sentence, tmp_path, capsys):
    overrides = [f"checkpoint={tiny_run()}", *DATA, *FEW, f"output={tmp_path}", override]
    said = mistake(capsys, "frontier", *overrides, "prior=null", override, task=frontier.main)
    assert sentence in said
