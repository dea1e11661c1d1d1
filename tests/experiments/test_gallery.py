import csv
from pathlib import Path

import pytest
import torch
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import gallery
from experiments.harness import pick
from featinv import FeatInv
from featinv.data import PhotosDataModule
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8

DATA = ["data=photos", "data.crops_per_photo=1"]


def shown(folder: Path, *overrides: str) -> list[dict]:
    run("gallery", *DATA, f"output={folder}", *overrides, task=gallery.main)
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def test_every_column_has_a_sampler_of_its_own(tmp_path):
    methods = f"{{plain: {{checkpoint: {tiny_run()}}}, guided: {{checkpoint: {tiny_run()}, "
    methods += "sampler: {feature_guidance_scale: 1, num_steps: 3}}}"
    rows = shown(tmp_path, f"methods={methods}", "num_pictures=2", "seed=3")
    (batch,) = PhotosDataModule(image_size=64, batch_size=3, crops_per_photo=1).test_dataloader()
    assert [row["image"] for row in rows] == batch["key"][:2]
    model = FeatInv.load(tiny_run())
    own = {"plain": {}, "guided": {"feature_guidance_scale": 1, "num_steps": 3}}
    for i, row in enumerate(rows):
        features = model.backbone.features(from_uint8(batch["image"][i : i + 1]))
        for name, options in own.items():
            drawn = eight_bit(model.invert(features, seed=3, indices=[i], **options)[:, 0])
            cosine = float(spatial_cosine(features, model.backbone.features(drawn)))
            assert float(row[name]) == pytest.approx(cosine, abs=2e-3)
        assert row["plain"] != row["guided"]
    page = (tmp_path / "table.md").read_text()
    assert "the first image of each class, in the order of the data set" in page
    assert "- guided: resnet10t, layer layer4, spatial conditioning; dpm_solver, 3 steps" in page
    with Image.open(tmp_path / "gallery.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**7)) > 100


def test_models_and_methods_stand_side_by_side(tmp_path):
    (tmp_path / "pooled").symlink_to(tiny_run("conditioning=pooled"))
    methods = f"methods={{own: {{checkpoint: {tiny_run()}}}}}"
    rows = shown(tmp_path / "out", f"checkpoints={tmp_path}/pooled", methods, "num_pictures=1")
    assert [list(row) for row in rows] == [["image", "pooled", "own"]]


def test_the_first_of_each_class_is_picked():
    def batches(*labels: list[int]):
        for start, own in enumerate(labels):
            numbers = torch.arange(len(own)) + 10 * start
            yield {"label": torch.tensor(own), "index": numbers, "key": [f"k{n}" for n in numbers]}

    labels = [4, 4, 1], [4, 7, 1], [2, 2, 9]
    assert pick(batches(*labels), 10)["index"].tolist() == [0, 2, 11, 20, 22]
    assert pick(batches(*labels), 3)["index"].tolist() == [0, 2, 11]
    unknown = batches([-1, -1], [-1, -1])
    assert pick(unknown, 3)["key"] == ["k0", "k1", "k10"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "There is nothing to show: expected checkpoints=[RUN], or methods"),
        (["methods=3"], "methods is '3', expected for example {plain: {checkpoint: RUN"),
        (["methods={a: RUN}"], "The method 'a' has no checkpoint: expected methods={plain"),
        (["methods={a: {checkpoint: R, smplr: {}}}"], "Unknown value of the method 'a' 'smplr'"),
        (
            ["methods={a: {checkpoint: R, sampler: {steps: 3}}}"],
            "Unknown value of the method 'a' 'steps': did you mean num_steps",
        ),
        (["methods={a: {checkpoint: nowhere}}"], "There is no checkpoint 'nowhere'"),
        (["checkpoints=[nowhere]"], "There is no model in 'nowhere'"),
        (["checkpoints=[RUN]", "num_pictures=0"], "num_pictures is 0: expected an integer"),
        (["methods={run: {checkpoint: R}}", "checkpoints=[RUN]"], "Two columns are called 'run'"),
        (["checkpoints=[PRIOR]"], "is a prior, which does not reconstruct"),
    ],
)
def test_bad_input(overrides, sentence, tmp_path, capsys):
    def real(override: str) -> str:
        if "PRIOR" in override:
            return override.replace("PRIOR", str(tiny_run("conditioning=none")))
        return override.replace("[RUN]", f"[{tiny_run()}]")

    overrides = [*DATA, f"output={tmp_path}", *map(real, overrides)]
    assert sentence in mistake(capsys, "gallery", *overrides, task=gallery.main)
