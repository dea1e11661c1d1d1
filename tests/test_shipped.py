"""The models that come with the package."""

import pytest
import torch

from featinv import FeatInv
from featinv.checkpoints import SHIPPED, find_checkpoint, load_prior


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_found_by_its_name(name):
    assert find_checkpoint(name) == SHIPPED[name]
    assert SHIPPED[name].stat().st_size < 15e6


def test_the_shipped_model_stands_on_the_shipped_prior():
    model = FeatInv.load("imagenette-small")
    assert model.config["unet"]["path"] == "imagenette-small-prior"
    prior = load_prior("imagenette-small-prior")
    torch.testing.assert_close(model.unet.state_dict(), prior.state_dict(), rtol=0, atol=0)
    assert sum(path.stat().st_size for path in SHIPPED.values()) < 30e6
