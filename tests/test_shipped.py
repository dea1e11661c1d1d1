"""The models that come with the package."""

import torch

from featinv import FeatInv
from featinv.checkpoints import SHIPPED, load_prior


def test_the_shipped_model_stands_on_the_shipped_prior():
    model = FeatInv.load("imagenette-small")
    assert model.config["unet"]["path"] == "imagenette-small-prior"
    prior = load_prior("imagenette-small-prior")
    torch.testing.assert_close(model.unet.state_dict(), prior.state_dict(), rtol=0, atol=0)
    assert sum(path.stat().st_size for path in SHIPPED.values()) < 30e6
