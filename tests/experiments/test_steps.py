import time

import pytest
import torch
from safetensors.torch import load_file

from featinv.evaluation.draws import draw
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit

PHOTOS = ["data.crops_per_photo=1", "num_images=3"]


@torch.no_grad()
def test_cosine_against_steps(tiny, model, photographs, experiment, tmp_path):
    own = ["schedulers=[ddim,unipc]", "steps=[1,3]", "num_samples=2", "seed=3"]
    rows = experiment("steps", f"checkpoint={tiny('spatial')}", *own, *PHOTOS, output=tmp_path)
    found = [(row["scheduler"], row["steps"]) for row in rows]
    assert found == [("ddim", "3"), ("ddim", "1"), ("unipc", "3"), ("unipc", "1")]
    assert rows[0]["difference to the first row"] == "0.000 [0.000, 0.000]"
    assert all(float(row["s per reconstruction"]) >= 0 for row in rows)
    # each image's cosine is the mean over its samples
    features = model.backbone.features(photographs)
    drawn = eight_bit(model.invert(features, 2, seed=3, scheduler="unipc", num_steps=3))
    cosine = torch.stack(
        [
            torch.stack([spatial_cosine(f[None], model.backbone.features(x[None]))[0] for x in s])
            for f, s in zip(features, drawn, strict=True)
        ]
    )
    measured = load_file(tmp_path / "rows" / "unipc_3.safetensors")["cosine"]
    torch.testing.assert_close(measured, cosine.mean(1), rtol=0, atol=1e-3)
    assert "noise schedule squaredcos_cap_v2" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "cosine_against_steps.png").is_file()


def test_seconds_wait_for_what_was_drawn_and_for_nothing_before(model, monkeypatch):
    monkeypatch.setattr("featinv.evaluation.draws.synchronize", lambda device: time.sleep(0.5))
    start = time.perf_counter()
    seconds = draw(model, torch.zeros(1, *model.backbone.feature_shape), [0], num_steps=1).seconds
    assert 0.5 <= seconds < time.perf_counter() - start - 0.5


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("schedulers=[dimm]", "Unknown scheduler 'dimm': did you mean ddim?"),
        ("steps=[0]", "steps is 0: expected an integer of at least 1"),
        ("sampler.num_steps=7", "compares several: expected steps=[7]."),
        ("checkpoint=nothing", "There is no checkpoint 'nothing'"),
    ],
)
def test_bad_values_fail_first(override, sentence, tiny, refusal):
    assert sentence in refusal("steps", f"checkpoint={tiny('spatial')}", *PHOTOS, override)
