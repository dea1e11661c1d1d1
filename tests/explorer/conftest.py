"""A tiny model of two layers, concepts of one, and two pictures: made once, not to be changed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featinv.analysis.concepts import Concepts
from featinv.checkpoints import build_model, save_model
from featinv.explorer.inputs import Photo, read_photo
from featinv.explorer.session import Exploration


@pytest.fixture(scope="session")
def files(make_tiny_config, wake, tmp_path_factory) -> dict[str, Path]:
    """The files, by the arguments of the command that take them."""
    folder = tmp_path_factory.mktemp("explorer")
    config = make_tiny_config()
    config["backbone"]["layer"] = ["layer3", "layer4"]  # features (256, 4, 4) and (512, 2, 2)
    torch.manual_seed(0)
    save_model(wake(build_model(config)), folder / "model.safetensors")
    directions = torch.nn.functional.normalize(torch.rand(3, 512), dim=1)
    concepts = Concepts(directions, torch.zeros(512), "nmf", "resnet10t layer4")
    concepts.save(folder / "concepts.safetensors")
    for seed, name in enumerate(("a photo (1).jpg", "other.png")):
        pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC).save(folder / name)
    return {
        "checkpoint": folder / "model.safetensors",
        "concepts": folder / "concepts.safetensors",
        "image": folder / "a photo (1).jpg",
        "second": folder / "other.png",
    }


@pytest.fixture(scope="session")
def exploration(files) -> Exploration:
    """The model and the concepts; the model inverts layer4 unless told."""
    device = torch.device("cpu")
    return Exploration.load(str(files["checkpoint"]), str(files["concepts"]), device)


@pytest.fixture(scope="session")
def photos(files) -> list[Photo]:
    """Both pictures, as the explorer reads them."""
    return [read_photo(files[key], files[key].name, 50) for key in ("image", "second")]
