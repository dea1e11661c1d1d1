import json

import pytest
import torch

import information
from featinv import FeatInv
from featinv.analysis.information import bits_kept, denoising_error

DATA = ["data=photos", "data.crops_per_photo=1", "num_images=3", "num_levels=3"]


def test_bits_are_those_of_the_library(tiny, photographs, experiment, tmp_path):
    models = [tiny("spatial"), tiny("pooled")]
    own = [f"checkpoints=[{models[0]},{models[1]}]", "num_samples=2"]
    rows = experiment("information", *own, *DATA, output=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["spatial", "pooled"]
    assert [row["features"] for row in rows] == ["spatial", "pooled"]
    model = FeatInv.load(models[1])
    error = results["pooled"]["epsilon_scaling"]
    assert error == pytest.approx(denoising_error(model, photographs), rel=1e-2)
    expected = bits_kept(model, photographs, num_levels=3, epsilon_scaling=error)
    found = torch.tensor(results["pooled"]["levels"])
    torch.testing.assert_close(found, expected.levels, rtol=1e-2, atol=1e-2)
    assert rows[1]["bits"].split()[0] == f"{expected.bits.mean():.0f}"
    assert len(results["pooled"]["logsnr"]) == 4 and len(results["pooled"]["agreement"]) == 3
    assert (tmp_path / "bits.png").is_file() and (tmp_path / "maps.png").is_file()


def test_planted_maps_can_be_measured(tiny, experiment, tmp_path):
    own = [f"checkpoints={tiny('planted')}", "num_samples=1", "epsilon_scaling=0.1"]
    (row,) = experiment("information", *own, *DATA, output=tmp_path, kept=True)
    assert (row["backbone"], row["layer"]) == ("mirror", "last")


def test_spread_where_nothing_is_known_is_a_correlation_of_minus_one():
    maps = torch.arange(32.0).view(2, 4, 4)
    spread = torch.nn.functional.interpolate(1 / (1 + maps[:, None]), (16, 16))[:, 0]
    assert information.rank_correlation(maps, spread).tolist() == pytest.approx([-1, -1])


def test_bands_are_over_photographs():
    photograph = torch.arange(2).repeat_interleave(10)
    levels = torch.tensor([[1.0, 2], [3, 4]]).repeat_interleave(10, 0)
    edges = torch.tensor([0.0, 1, 3])
    values = {"bits": levels.sum(1), "levels": levels, "logsnr": edges, "photograph": photograph}
    band = information.curves_figure({"model": values}).axes[1].collections[0].get_paths()[0]
    # Two photographs: each is drawn twice in a quarter of the resamples.
    assert (band.vertices[:, 1].min(), band.vertices[:, 1].max()) == (1, 3)
