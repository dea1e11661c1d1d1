import json

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from featinv import FeatInv
from featinv.data import PhotosDataModule
from featinv.evaluation.set_metrics import kernel_distance
from featinv.utils.pixels import from_uint8, to_uint8
from prior import draw_unconditionally

PHOTOS = ["data.crops_per_photo=2"]


@torch.no_grad()
def test_samples_of_a_prior_are_compared_and_shown(tiny, experiment, colours, tmp_path):
    models = f"checkpoints=[{tiny('prior')},{tiny('spatial')}]"
    own = [models, "batch_size=4", "seed=3", "num_pictures=5", "num_images=null"]
    rows = experiment("prior", *PHOTOS, *own, output=tmp_path)
    priors = json.loads((tmp_path / "metrics.json").read_text())["priors"]
    distances = priors["prior"]["sets"]["lite2"]
    assert [row["set"].split(":")[0] for row in rows] == [
        "ceiling",
        "codec",
        "samples of prior",
        "samples of spatial",
    ]
    assert list(priors["spatial"]["sets"]["lite2"]) == ["samples"]  # one table row of each limit
    assert rows[2]["kid_lite2"] == f"{distances['samples']['kid']:.3g}"
    page = (tmp_path / "table.md").read_text()
    assert "6 real images and as many samples of each prior, seed 3" in page
    assert "- prior: dpm_solver, 4 steps" in page
    # what the model draws without features, whatever the batch size
    model = FeatInv.load(tiny("prior"))
    nothing = torch.zeros(6, *model.backbone.feature_shape)
    drawn = to_uint8(model.invert(nothing, seed=3, guidance_scale=0)[:, 0])
    with Image.open(tmp_path / "prior.png") as picture:
        shown = torch.tensor(list(picture.convert("RGB").getdata())).view(36, 172, 3)
    assert torch.equal(shown[2:34, 2:34].permute(2, 0, 1).byte(), drawn[0])
    data = PhotosDataModule(image_size=64, batch_size=6, crops_per_photo=2)
    (batch,) = data.test_dataloader()
    real, samples = (colours()(from_uint8(images)) for images in (batch["image"], drawn))
    expected = kernel_distance(real, samples)
    assert distances["samples"]["kid"] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_a_model_with_a_condition_draws_without_it(model, images):
    """Whatever the features are."""
    config = OmegaConf.create(
        {
            "seed": 0,
            "batch_size": 4,
            "precision": "32-true",
            "sampler": {"guidance_scale": 0, "num_steps": 2},
        }
    )
    batch = {"index": torch.arange(5, 8), "key": ["a", "b", "c"]}
    drawn = draw_unconditionally(model, batch, config)["samples"]
    features = model.backbone.features(images)
    expected = model.invert(features, guidance_scale=0, num_steps=2, indices=[5, 6, 7])[:, 0]
    assert torch.equal(drawn, to_uint8(expected))


def test_bad_input(tiny, refusal):
    said = refusal("prior", f"checkpoints=[{tiny('prior')}]", "sampler.guidance_scale=2")
    assert "but a prior draws without a condition" in said
