import time

import pandas as pd
import pytest
import torch

from featinv.evaluation.draws import draw
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit

PHOTOS = ["data.crops_per_photo=1", "num_images=3", "witnesses=[]"]


@torch.no_grad()
def test_every_model_is_drawn_from_with_every_combination(
    tiny, model, photographs, experiment, tmp_path
):
    own = ["grid={num_steps: [3,1], scheduler: [ddim,unipc]}", "num_samples=2", "seed=3"]
    models = f"checkpoints=[{tiny('spatial')},{tiny('dropped')}]"
    rows = experiment("sampler_grid", models, *own, *PHOTOS, output=tmp_path)
    found = [(row["model"], row["dropout"], row["num_steps"], row["scheduler"]) for row in rows]
    points = [("3", "ddim"), ("3", "unipc"), ("1", "ddim"), ("1", "unipc")]
    names = [("spatial", "0.1"), ("dropped", "0.9")]
    assert found == [(*name, *point) for name in names for point in points]
    assert rows[0]["cosine - first row's"] == "0.000 [0.000, 0.000]"
    features = model.backbone.features(photographs)
    cosines = {}
    for scheduler in ("ddim", "unipc"):  # each image's cosine is the mean over its samples
        drawn = model.invert(features, 2, seed=3, scheduler=scheduler, num_steps=3)
        seen = model.backbone.features(eight_bit(drawn.flatten(0, 1)))
        cosine = spatial_cosine(features.repeat_interleave(2, 0), seen).view(3, 2).mean(1)
        scores = pd.read_csv(tmp_path / f"spatial_3_{scheduler}" / "per_image.csv")
        measured = torch.tensor(scores["reconstruction/spatial_cosine"].to_numpy()).float()
        torch.testing.assert_close(measured, cosine, rtol=0, atol=1e-3)
        cosines[scheduler] = cosine.mean()
    difference = float(rows[1]["cosine - first row's"].split()[0])
    assert difference == pytest.approx(float(cosines["unipc"] - cosines["ddim"]), abs=2e-3)
    assert (tmp_path / "cosine.png").is_file()


def test_seconds_wait_for_what_was_drawn_and_for_nothing_before(model, monkeypatch):
    monkeypatch.setattr("featinv.evaluation.draws.synchronize", lambda device: time.sleep(0.5))
    start = time.perf_counter()
    seconds = draw(model, torch.zeros(1, *model.backbone.feature_shape), [0], num_steps=1).seconds
    assert 0.5 <= seconds < time.perf_counter() - start - 0.5


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["grid={}"], "grid is '{}', expected for example {num_steps: [20,50]}."),
        (["grid={steps: [1]}"], "Unknown value of the sampler 'steps': did you mean num_steps"),
        (["grid={eta: 1}"], "grid.eta is 1, expected a list"),
        (["grid={scheduler: [dimm]}"], "Unknown scheduler 'dimm': did you mean ddim?"),
        (["grid={num_steps: [3]}", "sampler.num_steps=7"], "but grid.num_steps lists its values"),
    ],
)
def test_bad_values_fail_first(overrides, sentence, tiny, refusal):
    models = f"checkpoints=[{tiny('spatial')}]"
    assert sentence in refusal("sampler_grid", models, *PHOTOS, *overrides)


def test_what_has_no_condition_is_refused(tiny, refusal):
    models = f"checkpoints=[{tiny('prior')}]"
    said = refusal("sampler_grid", models, *PHOTOS, "grid={num_steps: [2]}")
    assert "is a prior without feature guidance" in said
