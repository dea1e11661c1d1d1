"""Tiny models, saved once for all tests, and a runner that checks that each config key is read."""

import copy
import csv
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
import torch
from helpers import mistake, run
from omegaconf import DictConfig, OmegaConf

from featinv import FeatInv
from featinv.checkpoints import build_model, save_model
from featinv.data import PhotosDataModule
from featinv.utils.pixels import from_uint8

PLANTED = {"_target_": "featinv.analysis.planted.load_planted", "name": "mirror", "image_size": 32}
# Changes to TINY_CONFIG; the value of "backbone" is merged, but for another class's.
VARIANTS = {
    "spatial": {},
    "pooled": {"conditioning": "pooled"},
    "prior": {"conditioning": "none"},
    "middle": {"backbone": {"layer": "layer2"}},
    "dropped": {"cond_drop_prob": 0.9},
    "wide": {"backbone": {"name": "resnet18"}},
    "layers": {"backbone": {"layer": ["layer4", "layer2"]}},
    "planted": {"backbone": PLANTED},
    "headless": {"backbone": {"name": "vit_tiny_patch16_224", "num_classes": 0}},
}


class Colours:
    """Stands in for an extractor: the mean colour of an image."""

    def __init__(self, name: str = "lite0") -> None:
        self.name = name

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Draw in float32, however fast bfloat16 is here."""
    seconds = {"32-true": 1.0, "bf16-mixed": 2.0}
    monkeypatch.setattr("featinv.utils.precision.convolution_seconds", lambda device: seconds)


@pytest.fixture(autouse=True)
def colours(monkeypatch) -> type[Colours]:
    """Compare sets of images by their colours, which is fast."""
    for module in ("featinv.evaluation.evaluator", "prior"):
        monkeypatch.setattr(f"{module}.Extractor", Colours)
    return Colours


@pytest.fixture(scope="session")
def tiny(request, tmp_path_factory) -> Callable[[str], Path]:
    """Return the folder of a variant's weights, whose draws depend on the features."""
    folder = tmp_path_factory.mktemp("tiny")
    shared = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))

    @cache
    def tiny(variant: str) -> Path:
        config = copy.deepcopy(shared.TINY_CONFIG)
        changes = copy.deepcopy(VARIANTS[variant])
        backbone = changes.pop("backbone", {})
        config["backbone"] = backbone if "_target_" in backbone else config["backbone"] | backbone
        torch.manual_seed(0)
        model = build_model(config | changes)
        generator = torch.Generator().manual_seed(1)
        awake = (model.controlnet, model.feature_encoder) if model.controlnet else ()
        for parameter in chain.from_iterable(module.parameters() for module in awake):
            if not parameter.any():  # zero-initialised: the features would have no effect
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        path = folder / variant / "model.safetensors"
        path.parent.mkdir()
        save_model(model, path)
        return path.parent

    return tiny


@pytest.fixture
def model(tiny) -> FeatInv:
    """The tiny spatial model."""
    return FeatInv.load(tiny("spatial"))


@pytest.fixture(scope="session")
def photographs() -> torch.Tensor:
    """The three images that the experiments are run on, in [-1, 1], shape (3, 3, 64, 64)."""
    data = PhotosDataModule(image_size=64, batch_size=3, crops_per_photo=1)
    return from_uint8(next(iter(data.test_dataloader()))["image"])


def leaves(node: object, prefix: str = "") -> set[str]:
    """Return the whole names of all single values in a config."""
    if not isinstance(node, dict):
        return {prefix}
    below = [
        leaves(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items()
    ]
    return set().union(*below)


def that_reads_all(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Wrap an experiment so that it fails if it never reads a value of its config."""

    @wraps(task)
    def checked(config: DictConfig) -> None:
        read, get = set(), DictConfig._get_node

        def get_and_record(self: DictConfig, key: object, *args, **options):
            names, node = [str(key)], self
            while node._get_parent() is not None:
                names.append(str(node._key()))
                node = node._get_parent()
            read.add(".".join(reversed(names)))
            return get(self, key, *args, **options)

        wanted = leaves(OmegaConf.to_container(config))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DictConfig, "_get_node", get_and_record)
            task(config)
        assert wanted <= read, f"never read: {sorted(wanted - read)}"

    # "Made by" names the file of the function.
    checked.__code__ = checked.__code__.replace(co_filename=task.__code__.co_filename)
    return checked


@pytest.fixture(scope="session")
def experiment() -> Callable[..., list[dict[str, str]]]:
    """Run an experiment that must read all of its config, and return its table if it has one."""

    def experiment(
        name: str, *overrides: str, output: Path, kept: bool = False
    ) -> list[dict[str, str]]:
        task = import_module(name).main
        task = task if kept else that_reads_all(task)  # kept rows are not made again
        run(name, *overrides, f"output={output}", task=task)
        if not (output / "table.csv").is_file():
            return []
        with (output / "table.csv").open() as file:
            return list(csv.DictReader(file))

    return experiment


@pytest.fixture
def refusal(capsys, tmp_path) -> Callable[..., str]:
    """Run an experiment that fails, and return its sentence."""

    def refusal(name: str, *overrides: str) -> str:
        task = import_module(name).main
        return mistake(capsys, name, f"output={tmp_path / 'refused'}", *overrides, task=task)

    return refusal
