"""Every config composes, names classes that exist, and builds."""

from collections.abc import Iterator
from inspect import signature

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from featinv.checkpoints import TARGETS, build_model
from featinv.cli.app import CONFIGS

FILES = [path.relative_to(CONFIGS).with_suffix("") for path in sorted(CONFIGS.rglob("*.yaml"))]
EXPERIMENTS = OmegaConf.load(CONFIGS / "experiments.yaml")  # a section each
SCRIPTS = ["train", "evaluate", "explorer", *EXPERIMENTS]
TRAIN_GROUPS = [
    next(iter(default))
    for default in OmegaConf.load(CONFIGS / "train.yaml").defaults
    if OmegaConf.is_dict(default)
]
TRAIN_OPTIONS = [
    f"{p.parent}={p.name}" for p in FILES if p.parts[0] in TRAIN_GROUPS and len(p.parts) > 1
]
# The option that a group belongs to, where that is not the default.
NEEDED = {"model/stable_diffusion": ["model=minisd"]}


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose(name, list(overrides))


def targets(node: object) -> set[str]:
    """Return every `_target_` in a config."""
    if not isinstance(node, dict):
        return set()
    return {node[key] for key in node if key == "_target_"}.union(*map(targets, node.values()))


def leaves(node: object, *keys: str) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the values in a config and the keys that lead to each."""
    if not isinstance(node, dict):
        yield keys, node
        return
    for key, value in node.items():
        yield from leaves(value, *keys, str(key))


def test_defaults_of_fractions_are_fractions():
    """A default of 1 would make a whole number of the value, and 1.5 an error."""
    files = [OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{file}.yaml")) for file in FILES]
    fractions = {"max_megapixels", "gpu_tflops"}
    for target in set.union(*map(targets, files)):
        options = signature(get_object(target)).parameters.values()
        fractions |= {o.name for o in options if o.annotation is float or type(o.default) is float}
    assert {"lr", "timestep_shift", "guidance_scale", "weight_decay"} < fractions
    found = [keys for file in files for keys, value in leaves(file) if type(value) is int]
    assert [keys for keys in found if fractions & set(keys)] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_targets_of_a_script_exist(script):
    for target in targets(OmegaConf.to_container(composed(script), resolve=True)):
        assert callable(get_object(target)), target


@pytest.mark.parametrize("option", TRAIN_OPTIONS)
def test_the_targets_of_an_option_exist(option):
    config = composed("train", option, *NEEDED.get(option.split("=")[0], []))
    container = OmegaConf.to_container(config, resolve=True)
    for target in targets(container):
        assert callable(get_object(target)), target
    assert targets(container["model"]) <= TARGETS  # else no checkpoint of it could be loaded
    if config.conditioning != "none" and "data.image_size" not in OmegaConf.missing_keys(config):
        assert config.data.image_size >= config.backbone.image_size


@pytest.mark.parametrize("option", [o for o in TRAIN_OPTIONS if o.startswith(("model=", "exper"))])
def test_the_model_of_an_option_builds(option, stable_diffusion):
    """With a backbone of random weights and, at the paper's scale, narrow networks."""
    small = ["backbone=resnet10t_random", "backbone.layer=last"]
    config = composed("train", option, *small)
    if config.model._target_ == "featinv.models.FeatInv" and config.model.image_size == 256:
        config.model.unet.path = str(stable_diffusion)
    model = build_model(OmegaConf.to_container(config.model, resolve=True))
    assert model.conditioning == config.conditioning


# Keys that people use in scripts: they may not be renamed. What each of them sets in the config.
STABLE = {
    "train": {
        "backbone.name=resnet50": "model.backbone.name",
        "backbone.layer=layer3": "model.backbone.layer",
        "conditioning=pooled": "model.conditioning",
        "data.root=here": "data.root",
        "trainer.max_steps=7": "trainer.max_steps",
        "trainer.devices=2": "trainer.devices",
        "trainer.precision=16-mixed": "trainer.precision",
        "sampler.num_steps=9": "model.sampler.num_steps",
        "sampler.guidance_scale=3": "model.sampler.guidance_scale",
        "seed=5": "data.seed",
        "resume=RUN": "resume",
    },
    "evaluate": {
        "checkpoint=RUN": "checkpoint",
        "images=a": "images",
        "num_samples=2": "num_samples",
        "seed=5": "seed",
        "data.root=here": "data.root",
        "sampler.num_steps=9": "sampler.num_steps",
        "sampler.guidance_scale=3": "sampler.guidance_scale",
        "backbone.layer=layer3": "backbone.layer",
    },
}


@pytest.mark.parametrize("script", STABLE)
def test_stable_keys(script):
    config = composed(script, "data=imagenette", *STABLE[script])
    for override, key in STABLE[script].items():
        assert str(OmegaConf.select(config, key)) == override.split("=")[1]


def test_the_small_models_never_see_the_validation_split_in_training():
    data = composed("train", "experiment=small", "data.root=here").data
    assert data.train_shards == "imagenette-train-{0000..0006}.tar"
    assert data.val_shards == "imagenette-train-0007.tar"


def test_ranks_that_slurm_started(monkeypatch):
    place = {"NTASKS": 4, "NTASKS_PER_NODE": 2, "NNODES": 2, "PROCID": 3, "LOCALID": 1, "NODEID": 1}
    for name, value in {**place, "JOB_ID": 70, "JOB_NAME": "featinv"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # the trainer sets it, for the whole process
    overrides = ["trainer=ddp", "trainer.num_nodes=2", "trainer.devices=2"]
    config = composed("train", *overrides, "trainer.accelerator=cpu", "trainer.precision=32-true")
    trainer = instantiate(config.trainer, logger=False, enable_progress_bar=False)
    assert (trainer.global_rank, trainer.world_size) == (3, 4)
