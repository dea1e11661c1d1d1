import shutil

import pytest
import torch
from data.conftest import make_shards
from omegaconf import OmegaConf

from featinv.analysis.perturbations import fgsm
from featinv.backbones import Backbone
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8, to_uint8
from robustness import invert

PHOTOS = ["data.crops_per_photo=1", "num_images=3"]
FEW = ["corruptions=[contrast]", "severities=[2]", "eps=[4]", "attack_steps=2", "num_pictures=2"]


def small(name: str, kind: str) -> Backbone:
    own = {"inverted": ("resnet10t", 10), "other_classes": ("test_vit", 7)}
    architecture, number = own.get(name, ("test_vit", 10))
    return Backbone(architecture, weights="random", image_size=32, num_classes=number)


@pytest.fixture(autouse=True, scope="module")
def witness():
    """Another classifier than the model's, but one that is fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featinv.evaluation.witnesses.extractor_backbone", small)
        yield


@pytest.fixture(scope="module")
def made(tiny, experiment, tmp_path_factory):
    """The table, the folder and the command of a run."""
    pytest.importorskip("imagecorruptions")
    folder = tmp_path_factory.mktemp("robustness")
    make_shards(folder, "unseen", [2])
    command = ["robustness", f"checkpoint={tiny('spatial')}", *PHOTOS, *FEW]
    command += [f"out_of_distribution={folder}/unseen-*.tar", f"altered={folder / 'altered'}"]
    return experiment(*command, output=folder / "out"), folder, command


@torch.no_grad()
def test_each_row_is_the_inversion_of_what_was_altered(made, model, photographs):
    rows, folder, _ = made
    names = ["unaltered", "contrast 2", "fgsm 4/255", "pgd 4/255", "out of distribution"]
    assert [row["images"] for row in rows] == names
    assert rows[0]["prediction changed"].startswith("0.000")
    features, logits = model.backbone.features_and_logits(fgsm(model.backbone, photographs, 4))
    drawn = eight_bit(model.invert(features)[:, 0])
    cosine = spatial_cosine(features, model.backbone.features(drawn)).mean().item()
    row = rows[2]
    assert float(row["spatial cosine to the altered image"][:5]) == pytest.approx(cosine, abs=2e-3)
    same = logits.argmax(1) == model.backbone.classify(drawn).argmax(1)
    assert float(row["same class as the altered image"][:5]) == pytest.approx(
        same.float().mean().item(), abs=2e-3
    )
    assert "3 images, 1 sample(s) each, seed 0" in (folder / "out" / "table.md").read_text()
    assert (folder / "out" / "strips" / "fgsm+4%2F255.png").is_file()


def test_altered_images_are_made_once_and_rows_too(made, experiment, tmp_path):
    rows, folder, command = made
    altered = sorted((folder / "altered").rglob("*.safetensors"))
    names = [str(file.relative_to(folder / "altered").with_suffix("")) for file in altered]
    assert names == [
        f"64px/{name}" for name in ("contrast+2", "resnet10t/fgsm+4%2F255", "resnet10t/pgd+4%2F255")
    ]
    before = [file.stat().st_mtime_ns for file in altered]
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "rows" / "contrast+2.safetensors").unlink()
    assert experiment(*command, output=tmp_path / "out") == rows
    assert [file.stat().st_mtime_ns for file in altered] == before


@torch.no_grad()
def test_noise_is_that_of_the_images_own_numbers(model, photographs):
    values = {"seed": 0, "batch_size": 4, "num_samples": 1, "precision": "32-true", "sampler": {}}
    whole = to_uint8(photographs)
    images = {"image": whole, "index": torch.arange(7, 10), "key": list("abc")}
    config = OmegaConf.create(values)
    found = invert(model, model.backbone, images, whole, config)["drawn"]
    features = model.backbone.features(from_uint8(whole))
    expected = to_uint8(model.invert(features, indices=[7, 8, 9])[:, 0])
    assert (found.int() - expected.int()).abs().max() <= 1


def test_images_altered_in_another_way_are_refused(made, refusal):
    said = refusal(*made[2], "attack_steps=3")
    assert "was made with attack_steps=2, not 3: expected another folder" in said


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("inverted", "'inverted' cannot be the witness, since it is the backbone that is inverted"),
        ("other_classes", "The witness 'test_vit' has 7 classes and 'resnet10t' 10"),
    ],
)
def test_witnesses_that_cannot_judge_are_refused(name, sentence, tiny, refusal):
    said = refusal("robustness", f"checkpoint={tiny('spatial')}", *PHOTOS, f"witness={name}")
    assert sentence in said
