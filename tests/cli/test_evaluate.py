import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
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
    data = ["data=photos", "data.crops_per_photo=1", "num_images=2"]
    run("evaluate", f"checkpoint={tiny_run()}", *data, *QUICK, f"output={tmp_path}")
    assert {path.name for path in tmp_path.iterdir()} == {
        ".hydra",
        "evaluate.log",
        "metrics.json",
        "per_image.csv",
        "reconstructions.png",
        "table.md",
    }
    assert metrics(tmp_path)["num_images"] == 2
    assert metrics(tmp_path)["sampler"]["num_steps"] == 2  # as the model was trained with
    table, command = (tmp_path / "table.md").read_text().split("\n\nMade by ")
    assert table in capsys.readouterr().out
    assert command.startswith(f"`python evaluate.py checkpoint={tiny_run()} data=photos")
    assert metrics(tmp_path)["data"]["crops_per_photo"] == 1


def test_it_agrees_with_the_evaluation_after_training(tmp_path):
    data = ["data=photos", "data.crops_per_photo=1"]
    run("evaluate", f"checkpoint={tiny_run()}", *data, *QUICK, f"output={tmp_path}")
    for row, scores in metrics(tiny_run())["rows"].items():
        for name, cell in scores.items():
            assert metrics(tmp_path)["rows"][row][name] == pytest.approx(cell, abs=1e-5)


def test_on_photographs_of_ones_own(tmp_path, folder_of_images):
    output = tmp_path / "out"
    images = f"images={folder_of_images}/*.png"
    overrides = ["num_images=1", "sampler=ddim", "sampler.num_steps=1"]  # only of data
    run("evaluate", f"checkpoint={tiny_run()}", images, *QUICK, *overrides, f"output={output}")
    assert metrics(output)["num_images"] == 3
    assert metrics(output)["data"] == f"{folder_of_images}/*.png"
    assert metrics(output)["checkpoint"] == str(tiny_run())
    sampler = metrics(output)["sampler"]
    assert (sampler["scheduler"], sampler["num_steps"]) == ("ddim", 1)
    keys = [line.split(",")[1] for line in (output / "per_image.csv").read_text().splitlines()]
    assert keys == ["key", "0", "1", "2"]


def test_on_a_folder_of_images(tmp_path, folder_of_images):
    overrides = ["data=folder", f"data.root={folder_of_images}", "data.num_workers=0"]
    overrides += [f"checkpoint={tiny_run()}/model.safetensors", f"output={tmp_path / 'out'}"]
    run("evaluate", *overrides, *QUICK)
    assert metrics(tmp_path / "out")["num_images"] == 3


def test_what_was_computed_is_kept_if_an_image_is_broken(capsys, tmp_path, folder_of_images):
    for i in range(3, 9):
        shutil.copy(folder_of_images / "0.png", folder_of_images / f"{i}.png")
    (folder_of_images / "9.png").write_bytes(b"no picture")
    output = tmp_path / "out"
    overrides = [f"checkpoint={tiny_run()}", f"images={folder_of_images}", f"output={output}"]
    sentence = mistake(capsys, "evaluate", *overrides, "witnesses=[]", "device=cpu")
    assert sentence.startswith(f"Cannot decode picture '{folder_of_images}/9.png'")
    assert metrics(output)["num_images"] == 8  # the first batch
    assert (output / "reconstructions.png").exists()


@pytest.mark.parametrize(
    "overrides",
    [["backbone=resnet10t_random"], ["backbone.name=resnet10t", "backbone.layer=layer4"]],
)
def test_the_backbone_may_be_named(tmp_path, folder_of_images, overrides):
    overrides = [*overrides, f"images={folder_of_images}/0.png", *QUICK]
    run("evaluate", f"checkpoint={tiny_run()}", *overrides, f"output={tmp_path / 'out'}")
    assert metrics(tmp_path / "out")["num_images"] == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("backbone.name=resnet50", "backbone.name is resnet50, but the checkpoint was trained wi"),
        ("backbone.layer=layer3", "backbone.layer is layer3, but the checkpoint was trained with"),
        ("backbone=resnet5O", "Unknown backbone config 'resnet5O': did you mean resnet50"),
        ("images=nothing/*.jpg", "'nothing/*.jpg' matches no image files"),
        ("data=imagenette data.root=nothing", "Shards 'imagenette-"),
        ("device=gpu", "The device 'gpu' cannot be used on this machine: expected auto or cpu"),
        ("num_samples=two", "num_samples is 'two', expected int, for example 4."),
        ("num_images=0", "num_images is 0: expected an integer of at least 1"),
        ("precision=16-true", "Unknown precision '16-true'"),
        ("witnesses=[lite9]", "Unknown witness 'lite9': did you mean lite"),
        ("sampler.num_steps=0", "sampler.num_steps is 0, expected 1 to 1000."),
        ("nmu_samples=2", "Unknown config key 'nmu_samples': did you mean num_samples"),
        ("sampler.steps=2", "Unknown config key 'sampler.steps': did you mean sampler.num_steps"),
    ],
)
def test_bad_input(capsys, tmp_path, overrides, sentence):
    overrides = [f"checkpoint={tiny_run()}", f"output={tmp_path}", *overrides.split()]
    assert mistake(capsys, "evaluate", *overrides).startswith(sentence)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there(capsys, tmp_path):
    overrides = [f"checkpoint={tiny_run()}", f"output={tmp_path}", "device=cuda"]
    assert mistake(capsys, "evaluate", *overrides) == (
        "The device 'cuda' cannot be used on this machine: expected auto or cpu."
    )


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "folder", "prior"])
def test_bad_checkpoints(capsys, tmp_path, kind):
    checkpoint = tmp_path / "model.safetensors"
    expected = "expected a file that train.py wrote."
    if kind == "missing":
        expected = "expected a run's folder, a .safetensors or a .ckpt file"
    elif kind == "truncated":
        checkpoint.write_bytes((tiny_run() / "model.safetensors").read_bytes()[:5000])
    elif kind == "foreign":
        checkpoint = tmp_path / "notes.txt"
        checkpoint.write_text("hello")
    elif kind == "folder":
        checkpoint, expected = tmp_path, "expected model.safetensors in it."
    else:
        checkpoint, expected = tiny_run("conditioning=none"), "The checkpoint is a prior"
    sentence = mistake(capsys, "evaluate", f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}")
    assert expected in sentence
    assert kind == "prior" or str(checkpoint) in sentence


def test_an_output_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").touch()
    overrides = [f"checkpoint={tiny_run()}", f"output={tmp_path}/file/out"]
    sentence = mistake(capsys, "evaluate", *overrides)
    assert sentence.startswith(f"Cannot use '{tmp_path}/file/out': Not a directory")
