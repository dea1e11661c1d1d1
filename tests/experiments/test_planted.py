import json

import pytest
import torch

import planted
from featinv.analysis.calibration import ratio_interval
from featinv.analysis.planted import load_planted
from featinv.checkpoints import build_model, save_model

DATA = ["data=photos", "data.crops_per_photo=2", "num_images=4", "image_size=32", "num_samples=3"]


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """A tiny model, not trained, of the truth `mirror`."""
    tiny_config["backbone"] = {
        "_target_": "featinv.analysis.planted.load_planted",
        "name": "mirror",
        "image_size": 32,
    }
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    save_model(build_model(tiny_config), tmp_path / "run" / "model.safetensors")
    return tmp_path / "run"


def test_every_method_is_scored_on_its_truth(checkpoint, experiment, tmp_path):
    overrides = [f"checkpoints=[{checkpoint}]", "truths=[low_pass,mirror]", "prior=null"]
    overrides += ["guided.num_steps=8"]
    rows = experiment("planted", *DATA, *overrides, output=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["low_pass"]) == ["optimisation of pixels"]
    assert list(found["mirror"]) == ["optimisation of pixels", "run plain", "run hybrid"]
    # Pixels reach the features by descent; what nobody trained does not.
    kept = found["low_pass"]["optimisation of pixels"]["kept"]
    assert sum(kept) / 4 < 0.4
    plain = found["mirror"]["run plain"]
    assert min(plain["kept"]) > 0.5 and "mode" not in found["low_pass"]["optimisation of pixels"]
    mode = torch.tensor(plain["mode"])
    neither = float((mode.abs() <= 0.5).float().mean())
    row = next(row for row in rows if row["method"] == "run plain")
    assert mode.shape == (4, 3)
    assert row["in neither mode (0)"].startswith(f"{neither:.3f}")
    assert plain["photograph"] == [0, 1, 2, 0]
    pairs = (torch.tensor(plain[name]) for name in ("between", "to_original", "photograph"))
    assert plain["ratio"] == pytest.approx(ratio_interval(*pairs))
    page = (tmp_path / "out" / "table.md").read_text()
    assert "4 images, 3 samples each, seed 0" in page and "0.75 of the images are in both" in page
    for truth in ("low_pass", "mirror"):
        assert (tmp_path / "out" / f"planted_{truth}.png").is_file()


def test_what_is_kept_of_mirror_images_shows_both():
    image = torch.zeros(3, 32, 32)
    image[:, :, :16] = 1
    assert planted.kept_picture(load_planted("mirror", 32), image).unique().tolist() == [191]
    assert planted.kept_picture(load_planted("low_pass", 32), image).unique().tolist() == [128, 255]


def test_models_of_real_backbones_are_refused(tiny, refusal):
    own = ["truths=[mirror]", "pixels=false", "prior=null", f"checkpoints=[{tiny('spatial')}]"]
    said = refusal("planted", *DATA, *own)
    assert "was trained on 'resnet10t': expected models of planted" in said


def test_a_truth_that_nothing_inverts(checkpoint, refusal):
    none = ["truths=[low_pass]", "pixels=false", "prior=null", f"checkpoints=[{checkpoint}]"]
    assert "Nothing inverts the truths ['low_pass']: expected" in refusal("planted", *DATA, *none)
