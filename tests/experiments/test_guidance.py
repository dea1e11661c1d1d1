import csv
from pathlib import Path

import pytest
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import guidance

DATA = ["data=photos", "data.crops_per_photo=2", "num_images=6", "extractors=[lite0]"]
LEARNS = [  # enough to see the condition
    "trainer.max_steps=4",
    "model.optimizer.lr=0.05",
    "callbacks.ema.decay=0",
    "model.warmup_steps=0",
]


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder with models of two dropouts."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for probability in (0, 0.9):
        (folder / f"p{probability}").symlink_to(
            tiny_run(f"model.cond_drop_prob={probability}", *LEARNS)
        )
    return folder


def arguments(runs: Path, tmp_path: Path, *names: str) -> list[str]:
    checkpoints = ",".join(f"{runs / name}/" for name in names)
    return [f"checkpoints=[{checkpoints}]", *DATA, f"output={tmp_path / 'out'}"]


def test_every_dropout_is_drawn_from_with_every_guidance(runs, tmp_path):
    overrides = [*arguments(runs, tmp_path, "p0", "p0.9"), "scales=[3,1]"]
    run("guidance", *overrides, task=guidance.main)
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["model"], row["dropout"], row["guidance"]) for row in rows]
    assert found == [
        ("p0", "0", "1"),
        ("p0", "0", "3"),
        ("p0.9", "0.9", "1"),
        ("p0.9", "0.9", "3"),
    ]
    cosine = [row["spatial cosine"] for row in rows]
    assert cosine[0] != cosine[1], "another guidance draws something else"
    assert cosine[0] != cosine[2], "another model does"
    assert all(row["kid_lite0"] for row in rows)
    page = (tmp_path / "out" / "table.md").read_text()
    assert "6 images, 1 sample(s) each, seed 0" in page and "experiments/guidance.py" in page
    with Image.open(tmp_path / "out" / "cosine_against_guidance.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**7)) > 50
    made = (tmp_path / "out" / "p0_1" / "metrics.json").stat().st_mtime_ns
    run("guidance", *overrides, task=guidance.main)
    assert (tmp_path / "out" / "p0_1" / "metrics.json").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("scales=[]", "scales is [], expected numbers, for example [1,1.75,3]."),
        ("scales=[-1]", "sampler.guidance_scale is -1, expected 0 or more"),
        ("scales=2", "scales is '2', expected a list, for example [1, 1.75, 3]."),
        ("scales=[high]", "scales is ['high'], expected numbers, for example [1,1.75,3]."),
        ("checkpoints=[nowhere]", "There is no model in 'nowhere'"),
    ],
)
def test_bad_input(override, sentence, runs, tmp_path, capsys):
    overrides = [*arguments(runs, tmp_path, "p0"), override]
    assert sentence in mistake(capsys, "guidance", *overrides, task=guidance.main)


def test_what_has_no_condition_or_another_layer_is_refused(runs, tmp_path, capsys):
    (runs / "prior").symlink_to(tiny_run("conditioning=none"))
    said = mistake(capsys, "guidance", *arguments(runs, tmp_path, "prior"), task=guidance.main)
    assert said == "'prior' is a prior, which has no condition: expected others."
    (runs / "other").symlink_to(tiny_run("backbone.layer=layer3"))
    names = arguments(runs, tmp_path, "p0", "other")
    said = mistake(capsys, "guidance", *names, "scales=[1]", task=guidance.main)
    assert said.startswith("Several layers are inverted ({'p0': 'resnet10t layer4', 'other'")
