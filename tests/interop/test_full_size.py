"""The paper's architecture at full size, with random weights: minutes, and 14 GB of memory."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from featinv.checkpoints import build_model
from featinv.cli.app import CONFIGS
from featinv.models.featinv import FeatInv
from featinv.utils.seeding import make_generator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> FeatInv:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("benchmark", ["scale=paper"])
    torch.manual_seed(0)
    return build_model(OmegaConf.to_container(config.model, resolve=True))


def test_two_training_steps(model):
    optimizer = model.make_optimizer(model.trained().parameters())
    images = torch.rand(1, 3, 288, 288) * 2 - 1
    timesteps, keep = torch.tensor([500]), torch.tensor([True])
    losses = []
    for _ in range(2):  # the zero-initialised layers let gradients through from the second on
        loss = model.losses(images, timesteps, keep, [make_generator(0)]).mean()
        loss.backward()
        losses.append(loss.item())
        dead = [n for n, p in model.controlnet.named_parameters() if p.grad is None]
        wasted = [n for n, p in model.unet.named_parameters() if p.grad is not None]
        assert dead == wasted == []
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] != losses[0]


def test_two_denoising_steps(model):
    images = torch.rand(1, 3, 288, 288) * 2 - 1
    features = model.backbone.features(images)
    drawn = model.invert(features, num_steps=2, scheduler="ddim")
    assert drawn.shape == (1, 1, 3, 256, 256) and drawn.isfinite().all()
