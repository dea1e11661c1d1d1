import csv
import json

import pytest
import torch
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import robustness
from featinv import FeatInv
from featinv.analysis.perturbations import fgsm
from featinv.data import PhotosDataModule
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8

DATA = ["data=photos", "data.crops_per_photo=1", "num_images=3", "witness=lite0"]
FEW = ["corruptions=[contrast]", "severities=[2]", "attacks=[fgsm]", "eps=[4]", "num_pictures=2"]


def measure(folder, *overrides: str) -> dict[str, dict[str, str]]:
    overrides = [f"checkpoint={tiny_run()}", *DATA, *FEW, *overrides]
    folders = [f"output={folder / 'out'}", f"altered={folder / 'altered'}"]
    run("robustness", *overrides, *folders, task=robustness.main)
    with (folder / "out" / "table.csv").open() as file:
        return {row.pop("images"): row for row in csv.DictReader(file)}


@torch.no_grad()
def test_each_row_is_the_inversion_of_what_was_altered(tmp_path):
    pytest.importorskip("imagecorruptions")
    rows = measure(tmp_path)
    assert list(rows) == ["unaltered", "contrast 2", "fgsm 4/255"]
    assert rows["unaltered"]["prediction changed"].startswith("0.000")
    model = FeatInv.load(tiny_run())
    (batch,) = PhotosDataModule(image_size=64, batch_size=3, crops_per_photo=1).test_dataloader()
    images = from_uint8(batch["image"])
    features, logits = model.backbone.features_and_logits(fgsm(model.backbone, images, 4))
    drawn = eight_bit(model.invert(features)[:, 0])
    cosine = spatial_cosine(features, model.backbone.features(drawn)).mean().item()
    row = rows["fgsm 4/255"]
    assert float(row["spatial cosine to the altered image"][:5]) == pytest.approx(cosine, abs=2e-3)
    same = logits.argmax(1) == model.backbone.classify(drawn).argmax(1)
    assert float(row["same class as the altered image"][:5]) == pytest.approx(
        same.float().mean().item(), abs=2e-3
    )
    page = (tmp_path / "out" / "table.md").read_text()
    assert "3 images, 1 sample(s) each, seed 0" in page and "witness tf_efficientnet_lite0" in page
    with Image.open(tmp_path / "out" / "strips" / "fgsm_4_of_255.png") as strip:
        assert strip.size == (2 * 34 + 2, 3 * 34 + 2)


def test_altered_images_are_made_once_and_rows_too(tmp_path):
    first = measure(tmp_path, "corruptions=[]")
    (kept,) = (tmp_path / "altered").rglob("*.safetensors")
    made = kept.stat().st_mtime_ns
    results = tmp_path / "out" / "results.json"
    saved = json.loads(results.read_text())
    saved["rows"]["unaltered"]["cosine"] = [0.5, 0.5, 0.5]
    del saved["rows"]["fgsm 4/255"]
    results.write_text(json.dumps(saved))
    again = measure(tmp_path, "corruptions=[]")
    assert again["unaltered"]["spatial cosine to the altered image"] == "0.500 [0.500, 0.500]"
    assert again["fgsm 4/255"] == first["fgsm 4/255"] and kept.stat().st_mtime_ns == made
    # another number of samples is another table, of the same altered images
    other = measure(tmp_path, "corruptions=[]", "num_samples=2")
    assert other["unaltered"] != again["unaltered"] and kept.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("corruptions=[fogg]", "Unknown corruption 'fogg': did you mean fog"),
        ("attacks=[pdg]", "Unknown attack 'pdg': did you mean pgd"),
        ("severities=[0]", "severities is 0: expected an integer of at least 1"),
        ("witness=lite7", "Unknown extractor 'lite7': did you mean lite"),
    ],
)
def test_bad_input(override, sentence, tmp_path, capsys):
    overrides = [f"checkpoint={tiny_run()}", *DATA, f"output={tmp_path}", override]
    assert sentence in mistake(capsys, "robustness", *overrides, task=robustness.main)


def test_images_of_another_set_are_not_taken_for_these(tmp_path, capsys):
    measure(tmp_path, "corruptions=[]")
    folders = [f"output={tmp_path / 'new'}", f"altered={tmp_path / 'altered'}"]
    overrides = [f"checkpoint={tiny_run()}", *DATA, *FEW, *folders, "corruptions=[]"]
    said = mistake(capsys, "robustness", *overrides, "num_images=2", task=robustness.main)
    assert "holds altered versions of other images: expected another folder" in said
