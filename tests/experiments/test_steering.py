import json

import pytest
import torch
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import concepts as concepts_experiment
from experiments import steering
from featinv import FeatInv
from featinv.analysis.concepts import Concepts
from featinv.data import PhotosDataModule
from featinv.utils.pixels import eight_bit, from_uint8

DATA = ["data=photos", "data.crops_per_photo=2", "num_images=6"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder of concepts of a tiny run's backbone."""
    folder = tmp_path_factory.mktemp("concepts")
    overrides = [f"checkpoint={tiny_run()}", *DATA, "method=nmf", "num_concepts=3"]
    overrides += ["num_pictures=2", f"output={folder}"]
    run("concepts", *overrides, task=concepts_experiment.main)
    return folder


def batch() -> dict:
    data = PhotosDataModule(image_size=64, batch_size=6, crops_per_photo=2)
    return next(iter(data.test_dataloader()))


def steer(found, folder, *overrides: str) -> dict[str, dict[str, list[float]]]:
    overrides = [
        f"checkpoint={tiny_run()}",
        f"concepts={found / 'concepts.safetensors'}",
        *overrides,
    ]
    run("steering", *overrides, *DATA, f"output={folder}", task=steering.main)
    return json.loads((folder / "results.json").read_text())


@torch.no_grad()
def test_each_concept_has_a_sheet(found):
    sheets = (found / "sheets.md").read_text()
    assert sheets.count("## Concept") == 3 and "6 images, seed 0" in sheets
    for k in range(3):
        with Image.open(found / f"concept_{k}.png") as picture:
            assert len(picture.convert("RGB").getcolors(10**7)) > 100
    model, concepts = FeatInv.load(tiny_run()), Concepts.load(found / "concepts.safetensors")
    features, logits = model.backbone.features_and_logits(from_uint8(batch()["image"]))
    # the class with the most of concept 0, and what removing it does to that class
    strength = concepts.presence(features)[:, 0].mean((1, 2))
    classes = logits.argmax(1)
    means = {int(c): strength[classes == c].mean().item() for c in classes.unique()}
    best = max(means, key=means.get)
    without = model.backbone.logits(concepts.steer(features, 0, 0.0))
    fall = (logits[:, best] - without[:, best])[classes == best].mean().item()
    first = next(line for line in sheets.splitlines() if line.startswith(f"| {best:>5} |"))
    assert f"{means[best]:.3f}" in first and f"{fall:.3f}" in first


@torch.no_grad()
def test_what_is_measured_is_what_the_reconstruction_has(found, tmp_path):
    results = steer(found, tmp_path, "concept=1", "factors=[0,2]", "num_pictures=2")
    assert list(results) == ["0", "1", "2"]  # 1 is what the others are compared with
    model, concepts = FeatInv.load(tiny_run()), Concepts.load(found / "concepts.safetensors")
    features, logits = model.backbone.features_and_logits(from_uint8(batch()["image"]))
    for factor, values in results.items():
        steered = concepts.steer(features, 1, float(factor))
        drawn = eight_bit(model.invert(steered)[:, 0])
        seen, seen_logits = model.backbone.features_and_logits(drawn)
        presence = concepts.presence(seen)[:, 1].mean((1, 2))
        assert values["presence"] == pytest.approx(presence.tolist(), rel=1e-2, abs=1e-3)
        probability = seen_logits.softmax(1)[range(6), logits.argmax(1)]
        assert values["probability"] == pytest.approx(probability.tolist(), rel=1e-2, abs=1e-4)
    asked = [sum(results[factor]["asked"]) for factor in ("0", "1", "2")]
    assert asked[0] == pytest.approx(0, abs=0.15 * asked[1]) and asked[2] > 1.5 * asked[1]
    page = (tmp_path / "table.md").read_text()
    assert "Concept 1 (nmf); 6 images, 1 sample(s) each, seed 0" in page
    assert "0.000 [0.000, 0.000]" in page  # factor 1 against itself
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > picture.height


def test_half_of_the_image(found, tmp_path):
    everywhere = steer(found, tmp_path / "all", "factors=[0]")["0"]["asked"]
    left = steer(found, tmp_path / "left", "factors=[0]", "side=left")["0"]["asked"]
    assert sum(left) > sum(everywhere)
    assert "in the left half" in (tmp_path / "left" / "table.md").read_text()


def test_the_images_with_most_of_the_concept_are_chosen(found, tmp_path):
    first = steer(found, tmp_path / "all", "factors=[1]")["1"]["asked"]
    file = f"concepts={found / 'concepts.safetensors'}"
    options = [f"checkpoint={tiny_run()}", file, "factors=[1]", *DATA, "among=6"]
    chosen = tmp_path / "chosen"
    run("steering", *options, "num_images=2", f"output={chosen}", task=steering.main)
    asked = json.loads((chosen / "results.json").read_text())["1"]["asked"]
    assert asked == pytest.approx(sorted(first, reverse=True)[:2], rel=1e-4)
    assert "2 images with most of it among 6" in (chosen / "table.md").read_text()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("among=5", "among is 5 with num_images=6: expected to choose from more images"),
        ("concept=3", "There is no concept 3: expected 0 to 2"),
        ("side=lft", "Unknown side 'lft': did you mean left"),
        ("concepts=nothing", "The concepts 'nothing' cannot be read"),
    ],
)
def test_bad_input(override, sentence, found, tmp_path, capsys):
    file = f"concepts={found / 'concepts.safetensors'}"
    overrides = [f"checkpoint={tiny_run()}", file, *DATA, f"output={tmp_path}", override]
    assert sentence in mistake(capsys, "steering", *overrides, task=steering.main)


def test_no_such_method(tmp_path, capsys):
    overrides = [f"checkpoint={tiny_run()}", *DATA, f"output={tmp_path}", "method=ica"]
    said = mistake(capsys, "concepts", *overrides, task=concepts_experiment.main)
    assert said.startswith("Unknown method for concepts 'ica'")
