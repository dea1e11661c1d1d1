"""Fixtures that the tests share: a model so small that a forward pass takes milliseconds."""

import copy
import json
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from featinv.checkpoints import build_model
from featinv.models.featinv import FeatInv
from featinv.utils.devices import keep_freed_memory

keep_freed_memory()  # as every entry point does

TINY_CONFIG = {
    "_target_": "featinv.models.FeatInv",
    "image_size": 32,
    "conditioning": "spatial",
    "train_unet": True,
    "hidden_channels": 16,
    "cond_drop_prob": 0.1,
    "seed": 0,
    "backbone": {
        "_target_": "featinv.backbones.Backbone",
        "name": "resnet10t",
        "weights": "random",
        "image_size": 64,
        "num_classes": 10,
    },
    "codec": {"_target_": "featinv.codecs.PatchPCA", "num_components": 4},  # latents 4 x 4 x 4
    "diffusion": {
        "_target_": "featinv.diffusion.Diffusion",
        "prediction_type": "v_prediction",
        "beta_schedule": "squaredcos_cap_v2",
    },
    "sampler": {
        "_target_": "featinv.sampling.SamplerConfig",
        "scheduler": "dpm_solver",
        "num_steps": 4,
        "guidance_scale": 1.5,
    },
    "unet": {
        "_target_": "diffusers.UNet2DConditionModel",
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 16,
        "norm_num_groups": 8,
    },
    "optimizer": {
        "_target_": "torch.optim.AdamW",
        "_partial_": True,
        "lr": 1e-3,
        "weight_decay": 0.01,
    },
    "lr_schedule": "constant_with_warmup",
    "warmup_steps": 0,
}


@pytest.fixture(scope="session")
def make_tiny_config() -> Callable[[], dict]:
    """Return `tiny_config` anew, for fixtures that outlive a test."""
    return partial(copy.deepcopy, TINY_CONFIG)


@pytest.fixture
def tiny_config(make_tiny_config) -> dict:
    """The config of a tiny model, as `featinv.checkpoints.build_model` takes it; free to edit.

    Backbone: resnet10t with random weights, 64 px, features (512, 2, 2), 10 classes.
    Latents: 4 x 4 x 4, images of 32 px.
    """
    return make_tiny_config()


@pytest.fixture
def tiny_model(tiny_config) -> FeatInv:
    """A tiny untrained model of `tiny_config`, always with the same weights."""
    torch.manual_seed(0)
    return build_model(tiny_config)


@pytest.fixture(scope="session")
def wake() -> Callable[[FeatInv], FeatInv]:
    """Move a model's zero-initialised weights away from zero, so that features have an effect."""

    def wake(model: FeatInv) -> FeatInv:
        generator = torch.Generator().manual_seed(1)
        for parameter in [*model.controlnet.parameters(), *model.feature_encoder.parameters()]:
            if not parameter.any():
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return wake


@pytest.fixture
def awake_model(tiny_model, wake) -> FeatInv:
    """A tiny model, not trained, but whose output depends on the features."""
    return wake(tiny_model)


@pytest.fixture
def images() -> torch.Tensor:
    """Three smooth random images, shape (3, 3, 32, 32), in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(3, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").tanh()


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory) -> Path:
    """A folder in the layout of Stable Diffusion 1, with narrow networks and random weights."""
    folder = tmp_path_factory.mktemp("stable_diffusion")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    ).save_pretrained(folder / "vae")
    letters = sorted({*string.ascii_lowercase, *",-"})
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=len(tokens) - 1,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def stable_diffusion_config(tiny_config, stable_diffusion) -> dict:
    """The config of a tiny model on the narrow Stable Diffusion; free to edit."""
    loader, path = "featinv.interop.stable_diffusion.load_", str(stable_diffusion)
    return tiny_config | {
        "unet": {"_target_": f"{loader}unet", "path": path},
        "codec": {"_target_": f"{loader}vae", "path": path},
        "prompts": {"_target_": f"{loader}prompts", "path": path},
        "diffusion": {"_target_": "featinv.diffusion.Diffusion"},
        "train_unet": False,
    }
