import json

import pytest
import torch
from helpers import mistake, tiny_run

import information
from featinv import FeatInv
from featinv.analysis.information import bits_kept, error_at
from featinv.data import PhotosDataModule
from featinv.utils.pixels import from_uint8

DATA = ["data=photos", "data.crops_per_photo=1", "num_images=3", "num_levels=3"]


def test_bits_are_those_of_the_model_side_by_side(experiment, tmp_path):
    names = ["spatial", "pooled"]
    for name in names:
        (tmp_path / name).symlink_to(tiny_run(f"conditioning={name}"))
    checkpoints = ",".join(f"{tmp_path / name}/" for name in names)
    overrides = [f"checkpoints=[{checkpoints}]", *DATA, "num_samples=2"]
    experiment("information", *overrides, output=tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == names
    (batch,) = PhotosDataModule(image_size=64, batch_size=3, crops_per_photo=1).test_dataloader()
    model = FeatInv.load(tiny_run("conditioning=pooled"))
    images = from_uint8(batch["image"])
    error = results["pooled"]["network_error"]
    assert error == pytest.approx(error_at(model, images), rel=1e-2)
    expected = bits_kept(model, images, num_levels=3, network_error=error)
    found = torch.tensor(results["pooled"]["levels"])
    torch.testing.assert_close(found, expected.levels, rtol=1e-2, atol=1e-2)
    assert len(results["pooled"]["logsnr"]) == 4 and len(results["pooled"]["agreement"]) == 3
    page = (tmp_path / "out" / "table.md").read_text()
    assert "3 images, 3 noise levels each" in page and "bounds for optimal denoisers only" in page
    for name in ("bits", "maps"):
        assert (tmp_path / "out" / f"{name}.png").is_file()


def test_spread_where_nothing_is_known_is_a_correlation_of_minus_one():
    maps = torch.arange(32.0).view(2, 4, 4)
    spread = torch.nn.functional.interpolate(1 / (1 + maps[:, None]), (16, 16))[:, 0]
    assert information.rank_correlation(maps, spread).tolist() == pytest.approx([-1, -1])


def test_what_has_no_bits_is_refused(tmp_path, capsys):
    prior = tiny_run("conditioning=none")
    overrides = [f"checkpoints=[{prior}]", *DATA, f"output={tmp_path}"]
    sentence = mistake(capsys, "information", *overrides, task=information.main)
    assert sentence.startswith("The model is a prior, which sees no features")
