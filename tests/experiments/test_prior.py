import json

import pytest
import torch
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import prior
from featinv import FeatInv
from featinv.data import PhotosDataModule
from featinv.evaluation.set_metrics import frechet_distance
from featinv.utils.pixels import from_uint8, to_uint8

DATA = ["data=photos", "data.crops_per_photo=2"]  # six images


class Colours:
    name, num_features = "lite0", 3

    def __init__(self, name: str = "lite0") -> None:
        pass

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(prior, "Extractor", Colours)


def test_samples_of_a_prior_are_judged_and_shown(tmp_path, capsys, colours):
    checkpoint = tiny_run("conditioning=none")
    overrides = [f"checkpoint={checkpoint}", *DATA, "num_images=6", "batch_size=4", "seed=3"]
    run("prior", *overrides, "num_pictures=5", f"output={tmp_path}", task=prior.main)
    distances = json.loads((tmp_path / "metrics.json").read_text())["sets"]["lite0"]
    assert list(distances) == ["ceiling", "codec", "samples"]
    page = (tmp_path / "table.md").read_text()
    assert "6 real images and as many samples, seed 3; dpm_solver, 2 steps" in page
    assert f"{distances['samples']['fd']:.3g} |" in page and page[:60] in capsys.readouterr().out
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (5 * 34 + 2, 34 + 2)
    # what was extracted is what the model draws without features, whatever the batch size
    model = FeatInv.load(checkpoint)
    nothing = torch.zeros(6, *model.backbone.feature_shape)
    drawn = to_uint8(model.invert(nothing, seed=3)[:, 0])
    with Image.open(tmp_path / "samples.png") as picture:
        shown = torch.tensor(list(picture.convert("RGB").getdata())).view(36, 172, 3)
    assert torch.equal(shown[2:34, 2:34].permute(2, 0, 1).byte(), drawn[0])
    data = PhotosDataModule(image_size=64, batch_size=6, crops_per_photo=2)
    (batch,) = data.test_dataloader()
    real, samples = (Colours()(from_uint8(images)) for images in (batch["image"], drawn))
    expected = frechet_distance(real, samples)
    assert distances["samples"]["fd"] == pytest.approx(expected, rel=1e-3)
    assert set(distances["samples"]) == {"fd", "kid", "precision", "recall"}


def test_of_a_model_with_a_condition_it_is_what_it_draws_without(tmp_path, colours):
    run("prior", f"checkpoint={tiny_run()}", *DATA, f"output={tmp_path}", task=prior.main)
    assert (tmp_path / "samples.png").exists()


def test_too_few_images(capsys, tmp_path):
    overrides = [f"checkpoint={tiny_run()}", "num_images=3", f"output={tmp_path}"]
    said = mistake(capsys, "prior", *overrides, task=prior.main)
    assert said.startswith("num_images is 3: expected an integer of at least 4")


def test_few_images_have_no_frechet_distance(tmp_path):
    overrides = [f"checkpoint={tiny_run()}", *DATA, "num_images=6", f"output={tmp_path}"]
    run("prior", *overrides, task=prior.main)
    head = (tmp_path / "table.md").read_text().splitlines()[0]
    assert "kid_lite0" in head and "fd_lite0" not in head
