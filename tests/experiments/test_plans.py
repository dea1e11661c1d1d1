"""Every step of the plans is a command that its script accepts."""

import re

import pytest
from helpers import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from pandas import json_normalize

from featinv import InputError
from featinv.cli.app import CONFIGS
from plans import PLANS
from plans.steps import Step


def plan_config(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    unseen = "out_of_distribution='a-{0..3}.tar'"
    with initialize_config_dir(str(CONFIGS / "reproduce"), version_base=None):
        return compose("reproduce", ["root=DATA", unseen, *overrides])


@pytest.mark.parametrize(
    ("scale", "overrides"),
    [
        ("small", []),
        ("paper", ["recipe=fast", "max_steps=2", "max_images=4"]),
    ],
)
def test_every_step_composes(scale, overrides):
    plan = PLANS[scale](plan_config(f"scale={scale}", *overrides))
    assert len(plan) > 25
    done, composed = set(), set()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        for step in plan.values():
            assert (ROOT / step.file).is_file()
            assert {needed.name for needed in step.needs} <= done, "its needs come before"
            done.add(step.name)
            choices = {k: v for k, v in step.overrides.items() if (CONFIGS / k).is_dir()}
            kind = (step.script, *step.overrides, *choices.items())
            if kind in composed:  # the same keys with other values
                continue
            composed.add(kind)
            config = compose(step.script, step.arguments)
            assert config.output == str(step.folder) and config.seed == 0


def test_the_papers_plan_has_what_the_paper_shows():
    plan = PLANS["paper"](plan_config("scale=paper"))
    three = ("resnet50", "convnext_base", "swinv2_base")
    columns = plan["gallery"].overrides["checkpoints"]
    assert [step.name for step in columns] == [f"train_{name}_spatial" for name in three]
    for kind in ("robustness", "mixtures"):
        assert [f"{kind}_{name}" in plan for name in three] == [True] * 3
    assert "ours" in plan["train_vit_base_pooled"].about
    table = {step.name for step in plan["reconstruction"].needs}
    assert {"train_decoder", "train_pixels", "train_prior", "train_vit_base_pooled"} <= table


def test_the_fast_recipe_names_each_value_that_differs_from_the_papers():
    values = []
    for recipe in ("paper", "fast"):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONFIGS), version_base=None):
            config = compose("train", [f"experiment={recipe}", "data.root=here"])
        values.append(json_normalize(OmegaConf.to_container(config)).iloc[0].to_dict())
    differing = [k for k in values[0] | values[1] if values[0].get(k) != values[1].get(k)]
    head = (CONFIGS / "experiment" / "fast.yaml").read_text().split("defaults:")[0]
    words = set(re.findall(r"\w+", head))
    assert [key for key in differing if not words & set(key.split(".")[-2:])] == ["output"]


def test_a_backbone_of_the_single_studies_has_a_model():
    with pytest.raises(InputError, match="backbone is 'resnet50', expected one of"):
        PLANS["paper"](plan_config("scale=paper", "backbone=resnet50", "backbones=[vit_base]"))
    with pytest.raises(InputError, match="Unknown recipe 'fats': did you mean fast"):
        PLANS["paper"](plan_config("scale=paper", "recipe=fats"))


def test_values_are_those_of_hydras_command_line(tmp_path):
    first = Step("first", "train", {}, tmp_path / "a b")
    values = {"n": 1, "zero": 0, "yes": True, "no": None, "many": [0.5, "x-{0..2}.tar"]}
    values["quotes"] = "it's"
    step = Step("second", "gallery", {"a": {"run": first, **values}}, tmp_path, after=(first,))
    assert step.needs == [first, first] and step.product == tmp_path / "table.md"
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("gallery", [f"+{step.arguments[0]}"])
    assert config.a == values | {"run": str(first.folder)}


def test_photographs_of_a_data_set_are_not_collected():
    plan = PLANS["small"](plan_config())
    assert "*.png" not in plan["mixtures"].results and "*.png" in plan["photos_mixtures"].results
    assert "curves.png" in plan["depth"].results and not plan["train_mirror_spatial"].results
