import pandas as pd
import pytest
import torch
from cli.test_configs import composed
from omegaconf.errors import OmegaConfBaseException

from featinv import InputError
from featinv.cli.user_errors import explain
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit
from sampler_grid import check_grid, find_points

PHOTOS = ["data.crops_per_photo=1", "num_images=3", "witnesses=[]"]


@torch.no_grad()
def test_every_model_is_drawn_from_with_every_combination(
    tiny, model, photographs, experiment, tmp_path
):
    own = ["grid={scheduler: [ddim,unipc], num_steps: [3]}", "num_samples=2", "seed=3"]
    models = f"checkpoints=[{tiny('spatial')},{tiny('dropped')}]"
    rows = experiment("sampler_grid", models, *own, *PHOTOS, output=tmp_path)
    found = [(row["model"], row["dropout"], row["scheduler"], row["num_steps"]) for row in rows]
    names = [("spatial", "0.1"), ("dropped", "0.9")]
    assert found == [(*name, scheduler, "3") for name in names for scheduler in ("ddim", "unipc")]
    assert rows[0]["cosine - first row's"] == "0.000 [0.000, 0.000]"
    features = model.backbone.features(photographs)
    cosines = {}
    for scheduler in ("ddim", "unipc"):  # each image's cosine is the mean over its samples
        drawn = model.invert(features, 2, seed=3, scheduler=scheduler, num_steps=3)
        seen = model.backbone.features(eight_bit(drawn.flatten(0, 1)))
        cosine = spatial_cosine(features.repeat_interleave(2, 0), seen).view(3, 2).mean(1)
        scores = pd.read_csv(tmp_path / f"spatial+{scheduler}+3" / "per_image.csv")
        measured = torch.tensor(scores["reconstruction/spatial_cosine"].to_numpy()).float()
        torch.testing.assert_close(measured, cosine, rtol=0, atol=1e-3)
        cosines[scheduler] = cosine.mean()
    difference = float(rows[1]["cosine - first row's"].split()[0])
    assert difference == pytest.approx(float(cosines["unipc"] - cosines["ddim"]), abs=2e-3)
    assert (tmp_path / "cosine.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["grid={}"], "grid is '{}', expected for example {num_steps: "),
        (
            ["grid={steps: [1]}"],
            "Unknown config key 'sampler.steps': did you mean sampler.num_steps",
        ),
        (["grid={eta: 1}"], "grid.eta is 1, expected a list"),
        (["grid={scheduler: [dimm]}"], "Unknown scheduler 'dimm': did you mean ddim?"),
        (["grid={num_steps: [3]}", "sampler.num_steps=7"], "but grid.num_steps lists its values"),
    ],
)
def test_bad_values_fail_before_any_drawing(overrides, sentence, tiny):
    config = composed("sampler_grid", f"checkpoints=[{tiny('spatial')}]", *overrides)
    with pytest.raises((InputError, OmegaConfBaseException)) as error:
        check_grid(config)
        find_points(config)
    assert sentence in explain(error.value)
