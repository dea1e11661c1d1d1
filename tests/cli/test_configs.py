from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from featinv.backbones import PYPI_WEIGHTS
from featinv.checkpoints import TARGETS
from featinv.cli.app import CONFIGS
from featinv.diffusion import Diffusion

ROOT = CONFIGS.parent
FILES = sorted(path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml"))
# What the user has to say: no default could be right.
NEEDED = {
    "data": {"data.root", "data.train_shards", "data.val_shards"},
    "model": {"model.unet.path"},
    "experiment": {"data.root"},
    "sweep": {"data.root"},
    "evaluate": {"checkpoint"},
}


def composed(name: str, *overrides: str) -> dict:
    """Return a config with all values resolved."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose(name, list(overrides))
    return OmegaConf.to_container(config, resolve=True), set(OmegaConf.missing_keys(config))


def options(*groups: str) -> list[tuple[str, str]]:
    found = [(str(p.parent), p.name) for p in FILES if str(p.parent) in groups]
    if "experiment" in groups:  # their subfolders only order them
        experiments = (p.relative_to("experiment") for p in FILES if p.parts[0] == "experiment")
        found += [("experiment", str(p)) for p in experiments if len(p.parts) > 1]
    assert {group for group, _ in found} == set(groups)
    return found


def test_all_config_groups_are_tested():
    groups = {str(path.parent) for path in FILES if path.parts[0] != "experiment"} - {"."}
    assert groups | {"experiment"} == {*TRAIN_GROUPS, "scale", "reproduce", "reproduce/scale"}
    names = [str(path) for path in FILES if path.parent == Path(".")]
    assert names == [
        "benchmark",
        "concepts",
        "depth",
        "evaluate",
        "explorer",
        "frontier",
        "gallery",
        "guidance",
        "invariances",
        "mixtures",
        "prior",
        "reconstruction",
        "robustness",
        "steering",
        "steps",
        "train",
        "train_backbone",
        "units",
    ]


TRAIN_GROUPS = (
    "backbone",
    "callbacks",
    "data",
    "experiment",
    "logger",
    "model",
    "model/stable_diffusion",
    "model/unet",
    "sampler",
    "sweep",
    "trainer",
)


def targets(node: object) -> set[str]:
    if isinstance(node, dict):
        own = {node["_target_"]} if "_target_" in node else set()
        return own.union(*map(targets, node.values()))
    return set()


@pytest.mark.parametrize(("group", "option"), options(*TRAIN_GROUPS))
def test_every_option_of_train_composes(group, option):
    overrides = ["model=minisd"] if group == "model/stable_diffusion" else []
    config, missing = composed("train", f"{group}={option}", *overrides)
    assert missing <= NEEDED.get(group.split("/")[0], set())
    assert isinstance(config["trainer"]["max_steps"], int)
    assert config["model"]["backbone"] == config["backbone"]
    if config["conditioning"] != "none":  # nobody looks
        assert config["data"]["image_size"] >= config["backbone"]["image_size"]
    for target in targets(config):
        assert callable(get_object(target)), target
    assert targets(config["model"]) <= TARGETS  # else no checkpoint of it could be loaded


@pytest.mark.parametrize(("group", "option"), options("backbone", "data", "sampler"))
def test_every_option_of_evaluate_composes(group, option):
    config, missing = composed("evaluate", f"{group}={option}")
    assert missing <= NEEDED["evaluate"] | NEEDED.get(group, set())
    assert set(config[group]) >= set(composed("train", f"{group}={option}")[0][group])


@pytest.mark.parametrize(("group", "option"), options("sweep"))
def test_every_job_of_a_sweep_composes(group, option):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("train", [f"sweep={option}"], return_hydra_config=True)
    params = {key: "".join(v.split()).split(",") for key, v in config.hydra.sweeper.params.items()}
    for values in product(*params.values()):
        job = [f"{key}={value}" for key, value in zip(params, values, strict=True)]
        assert composed("train", f"sweep={option}", *job)[1] == {"data.root"}
    wandb = ROOT / "experiments" / "sweeps" / f"{option}.yaml"
    if wandb.is_file():  # the same, for Weights & Biases
        swept = OmegaConf.to_container(OmegaConf.load(wandb))["parameters"]
        assert {key: v["values"] for key, v in swept.items()} == params


@pytest.mark.parametrize(("group", "option"), options("scale"))
def test_every_scale_of_the_benchmark_composes(group, option):
    config, missing = composed("benchmark", f"{group}={option}")
    assert missing == set() and config["scale"] == option
    assert config["model"]["backbone"] == config["backbone"]
    assert targets(config["model"]) <= TARGETS


def test_the_steps_are_told_what_an_evaluation_is_told():
    config, missing = composed("steps")
    assert missing == NEEDED["evaluate"]
    assert config.keys() - composed("evaluate")[0].keys() == {"schedulers", "steps"}


@pytest.mark.parametrize(("group", "option"), options("backbone"))
def test_backbones_name_weights_that_can_be_had(group, option):
    backbone = composed("train", f"{group}={option}")[0]["backbone"]
    if option == "planted":  # has none
        return
    if option.startswith("imagenette_"):  # trained by experiments/train_backbone.py
        folder = f"outputs/small/backbones/{backbone['name']}"
        assert backbone["weights"] == f"{folder}/model.safetensors"
        return
    assert backbone["weights"] in ("timm", "pypi", "random")
    assert (backbone["weights"] == "pypi") == (backbone["name"] in PYPI_WEIGHTS)


# People script these: they may not be renamed (issue 2).
@pytest.mark.parametrize(
    ("name", "overrides", "key", "value"),
    [
        ("train", ["backbone=resnet50"], "backbone.name", "resnet50.a1_in1k"),
        ("train", ["backbone.name=vit_tiny_patch16_224"], "backbone.name", "vit_tiny_patch16_224"),
        ("train", ["backbone.layer=layer3"], "model.backbone.layer", "layer3"),
        ("train", ["conditioning=pooled"], "model.conditioning", "pooled"),
        ("train", ["conditioning=spatial"], "model.conditioning", "spatial"),
        ("train", ["data=imagenette", "data.root=here"], "data.root", "here"),
        ("train", ["model=small"], "model.unet._target_", "diffusers.UNet2DConditionModel"),
        ("train", ["trainer.max_steps=7"], "trainer.max_steps", 7),
        ("train", ["trainer.devices=2"], "trainer.devices", 2),
        ("train", ["trainer.precision=16-mixed"], "trainer.precision", "16-mixed"),
        ("train", ["sampler.num_steps=9"], "model.sampler.num_steps", 9),
        ("train", ["sampler.guidance_scale=3"], "model.sampler.guidance_scale", 3),
        ("train", ["seed=5"], "seed", 5),
        ("train", ["seed=5"], "model.seed", 5),
        ("train", ["seed=5"], "data.seed", 5),
        ("train", ["resume=RUN"], "resume", "RUN"),
        ("train", ["experiment=quickstart"], "output", "outputs/quickstart"),
        ("evaluate", ["checkpoint=RUN"], "checkpoint", "RUN"),
        ("evaluate", ["images='a/*.jpg'"], "images", "a/*.jpg"),
        ("evaluate", ["num_samples=2"], "num_samples", 2),
        ("evaluate", ["seed=5"], "seed", 5),
        ("evaluate", ["data=imagenette", "data.root=here"], "data.root", "here"),
        ("evaluate", ["sampler.num_steps=9"], "sampler.num_steps", 9),
        ("evaluate", ["sampler.guidance_scale=3"], "sampler.guidance_scale", 3),
        ("evaluate", ["backbone=resnet50"], "backbone.name", "resnet50.a1_in1k"),
        ("evaluate", ["backbone.layer=layer3"], "backbone.layer", "layer3"),
    ],
)
def test_stable_keys(name, overrides, key, value):
    config, _ = composed(name, *overrides)
    for part in key.split("."):
        config = config[part]
    assert config == value


BACKBONES = {
    "resnet50": "resnet50.a1_in1k",
    "convnext_base": "convnext_base.fb_in22k_ft_in1k",
    "swinv2_base": "swinv2_base_window12to16_192to256.ms_in22k_ft_in1k",
    "vit_base": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
}


@pytest.mark.parametrize("conditioning", ["spatial", "pooled"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_papers_recipe(backbone, conditioning):
    """The recipe of the original, as its code has it."""
    config, _ = composed("train", f"experiment=paper/{backbone}_{conditioning}", "data.root=here")
    model, trainer = config["model"], config["trainer"]
    assert model["backbone"]["name"] == BACKBONES[backbone]
    assert model["conditioning"] == conditioning
    assert model["unet"]["path"] == model["codec"]["path"] == model["prompts"]["path"]
    assert model["unet"]["path"] == "lambda/miniSD-diffusers"
    assert model["unet"]["dtype"] == "float32" and model["train_unet"] is False
    assert model["prompts"]["prompt"] == "a high-quality, detailed, and professional image"
    assert (model["image_size"], model["hidden_channels"]) == (256, 512)
    assert model["cond_drop_prob"] == 0.15
    assert model["diffusion"] == {"_target_": "featinv.diffusion.Diffusion"}
    assert model["optimizer"]["lr"] == 1e-5 and model["optimizer"]["weight_decay"] == 0.01
    assert (model["lr_schedule"], model["warmup_steps"]) == ("constant_with_warmup", 0)
    assert (config["data"]["image_size"], config["data"]["batch_size"]) == (288, 8)
    assert config["data"]["vertical_flip"] is True and config["data"]["min_scale"] == 0.08
    assert (config["epochs"], config["data"]["num_train_images"]) == (3, 1281167)
    assert trainer["precision"] == "32-true" and trainer["gradient_clip_val"] is None
    assert "ema" not in config["callbacks"]
    sampler = config["sampler"]
    assert (sampler["scheduler"], sampler["num_steps"], sampler["eta"]) == ("ddim", 50, 0)
    assert (sampler["guidance_scale"], sampler["guidance"]) == (1.75, "text")
    diffusion = Diffusion()
    assert diffusion.prediction_type == "epsilon" and diffusion.num_train_timesteps == 1000
    assert diffusion.timestep_shift == 1 and diffusion.min_snr_gamma is None


@pytest.mark.parametrize("name", ["paper", "fast", "small"])
def test_a_recipe_is_the_same_for_all_backbones(name):
    different = ("backbone", "conditioning", "output")
    recipes = []
    for path in (CONFIGS / "experiment" / name).glob("*_*.yaml"):
        if not path.stem.endswith(("_spatial", "_pooled")):  # what they are compared with
            continue
        root = ["data.root=here"] if name == "small" else []
        size = "data.image_size=288"  # the paper's; that of the backbone in the small recipe
        config, _ = composed("train", f"experiment={name}/{path.stem}", "output=out", size, *root)
        for part in (config, config["model"]):
            for key in different:
                part.pop(key, None)
        recipes.append(config)
    assert len(recipes) == 8 and all(recipe == recipes[0] for recipe in recipes)


def test_the_small_models_never_see_the_validation_split_in_training():
    for path in (CONFIGS / "experiment" / "small").glob("*.yaml"):
        config, _ = composed("train", f"experiment=small/{path.stem}", "data.root=here")
        assert config["data"]["train_shards"] == "imagenette-train-{0000..0006}.tar"
        assert config["data"]["val_shards"] == "imagenette-train-0007.tar"
        if config["model"]["_target_"] == "featinv.models.FeatInv":
            assert config["model"]["codec"]["num_components"] == 48


def test_a_prior_replaces_the_whole_unet():
    config, _ = composed("train", "model=small_on_prior", "model.unet.path=RUN")
    assert config["model"]["unet"] == {
        "_target_": "featinv.checkpoints.load_prior",
        "path": "RUN",
    }
    assert config["model"]["train_unet"] is False


def test_ranks_on_two_machines():
    overrides = ["trainer=ddp", "trainer.num_nodes=2", "trainer.devices=3"]
    config, _ = composed("train", *overrides, "trainer.accelerator=cpu")
    trainer = instantiate(config["trainer"], logger=False, enable_progress_bar=False)
    assert isinstance(trainer.strategy, DDPStrategy) and trainer.world_size == 6


def test_ranks_that_slurm_started(monkeypatch):
    place = {"NTASKS": 4, "NTASKS_PER_NODE": 2, "NNODES": 2, "PROCID": 3, "LOCALID": 1, "NODEID": 1}
    for name, value in {**place, "JOB_ID": 70, "JOB_NAME": "featinv"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # the trainer sets it, for the whole process
    overrides = ["trainer=ddp", "trainer.num_nodes=2", "trainer.devices=2"]
    config, _ = composed("train", *overrides, "trainer.accelerator=cpu")
    trainer = instantiate(config["trainer"], logger=False, enable_progress_bar=False)
    assert (trainer.global_rank, trainer.world_size) == (3, 4)


def test_evaluate_leaves_to_the_checkpoint_what_is_not_given():
    config, _ = composed("evaluate")
    for group in ("sampler", "backbone"):
        assert set(config[group].values()) == {None}
