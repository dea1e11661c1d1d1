import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import mistake, run, tiny_run
from PIL import Image

QUICK = ["num_samples=2", "device=cpu", "precision=32-true", "witnesses=[]"]


@pytest.fixture
def folder_of_images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        rough = random.integers(0, 255, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(rough).resize((70, 90)).save(folder / f"{i}.png")
    return folder


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_on_a_data_set(capsys, tmp_path):
    data = ["data=photos", "data.crops_per_photo=1"]
    run("evaluate", f"checkpoint={tiny_run()}", *data, *QUICK, f"output={tmp_path}")
    assert {path.name for path in tmp_path.iterdir()} == {
        ".hydra",
        "evaluate.log",
        "metrics.json",
        "per_image.csv",
        "reconstructions.png",
        "table.md",
    }
    table, command = (tmp_path / "table.md").read_text().split("\n\nMade by ")
    assert table in capsys.readouterr().out
    assert command.startswith(f"`python evaluate.py checkpoint={tiny_run()} data=photos")
    assert metrics(tmp_path)["data"]["crops_per_photo"] == 1
    after_training = metrics(tiny_run())
    assert metrics(tmp_path)["sampler"] == after_training["sampler"]
    for row, scores in after_training["rows"].items():
        for name, cell in scores.items():
            assert metrics(tmp_path)["rows"][row][name] == pytest.approx(cell, abs=1e-5)


def test_on_your_own_photographs(tmp_path, folder_of_images):
    output = tmp_path / "out"
    images = f"images={folder_of_images}/*.png"
    overrides = ["num_images=1", "sampler=ddim", "sampler.num_steps=1"]  # num_images is of data
    overrides += ["backbone.name=resnet10t", "backbone.layer=layer4"]  # which it was trained with
    run("evaluate", f"checkpoint={tiny_run()}", images, *QUICK, *overrides, f"output={output}")
    assert metrics(output)["num_images"] == 3
    assert metrics(output)["data"] == f"{folder_of_images}/*.png"
    assert metrics(output)["checkpoint"] == str(tiny_run())
    sampler = metrics(output)["sampler"]
    assert (sampler["scheduler"], sampler["num_steps"]) == ("ddim", 1)
    keys = [line.split(",")[1] for line in (output / "per_image.csv").read_text().splitlines()]
    assert keys == ["key", "0", "1", "2"]


def test_results_are_kept_if_an_image_is_broken(capsys, tmp_path, folder_of_images):
    for i in range(3, 9):
        shutil.copy(folder_of_images / "0.png", folder_of_images / f"{i}.png")
    (folder_of_images / "9.png").write_bytes(b"no picture")
    output = tmp_path / "out"
    overrides = [f"checkpoint={tiny_run()}", f"images={folder_of_images}", f"output={output}"]
    sentence = mistake(capsys, "evaluate", *overrides, *QUICK)
    assert sentence.startswith("1 of 10 samples cannot be read, more than 5%: 9;")
    assert metrics(output)["num_images"] == 9
    assert (output / "reconstructions.png").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("backbone.name=resnet50", "backbone.name is resnet50, but the checkpoint was trained wi"),
        ("model=small", "Could not override 'model'. No match in the defaults list."),
        ("images=nothing/*.jpg", "'nothing/*.jpg' matches no image file"),
        ("device=gpu", "The device 'gpu' cannot be used on this machine: expected auto or cpu"),
        ("num_images=0", "num_images is 0: expected an integer of at least 1"),
        ("sampler.num_steps=0", "sampler.num_steps is 0, expected 1 to 1000."),
        ("checkpoint=nothing", "There is no checkpoint 'nothing': expected a run's folder"),
        ("checkpoint=PRIOR", "The model is a prior"),
    ],
)
def test_bad_input(capsys, tmp_path, overrides, sentence):
    if overrides == "checkpoint=PRIOR":
        overrides = f"checkpoint={tiny_run('conditioning=none')}"
    arguments = [f"checkpoint={tiny_run()}", f"output={tmp_path}", overrides]
    assert mistake(capsys, "evaluate", *arguments).startswith(sentence)
    assert not (tmp_path / "metrics.json").exists()
