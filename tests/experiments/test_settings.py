import json
from dataclasses import replace

import pytest
import torch
from cli.test_configs import composed
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError
from safetensors.torch import save_file

from featinv import InputError
from featinv.checkpoints import SHIPPED
from featinv.cli.app import CONFIGS
from featinv.cli.user_errors import explain
from featinv.sampling import SamplerConfig
from settings import Setting, as_list, dependencies, each_layer, find_models, find_settings

SAMPLER = {"num_steps": None, "eta": None}


def config(checkpoints: object = None, methods: object = None) -> OmegaConf:
    values = {"checkpoints": checkpoints, "methods": methods, "sampler": SAMPLER, "layer": None}
    config = OmegaConf.create(values)
    OmegaConf.set_struct(config, True)  # as Hydra does
    return config


def test_models_are_found_in_folders_files_and_the_package(tiny, tmp_path):
    (tmp_path / "runs" / "sub").mkdir(parents=True)
    for name, variant in {"a": "spatial", "sub/b": "pooled"}.items():
        (tmp_path / "runs" / name).symlink_to(tiny(variant))
    classifier = tmp_path / "runs" / "sub" / "model.safetensors"
    save_file({"weights": torch.zeros(1)}, classifier)  # is no model of ours
    found = find_models([str(tmp_path / "runs" / "a"), str(tmp_path / "runs" / "sub" / "b")])
    assert set(found) == {"a", "b"}
    with pytest.raises(InputError, match="There is no model in"):
        find_models(str(classifier.parent))
    assert find_models("imagenette-small") == {"imagenette-small": "imagenette-small"}
    file = str(tiny("spatial") / "model.safetensors")
    assert find_models([file]) == {"model": file}
    with pytest.raises(InputError, match="Two models are called 'model'"):
        find_models([file, str(tiny("pooled") / "model.safetensors")])


def test_an_option_of_several_values_takes_one_without_brackets():
    assert as_list("train_*") == ["train_*"]
    assert as_list(OmegaConf.create(["a", "b"])) == ["a", "b"]


def test_methods_come_after_models_and_without_a_checkpoint_not_at_all(tiny):
    methods = {"few": {"checkpoint": "RUN", "sampler": {"num_steps": 3}}}
    methods["prior"] = {"checkpoint": None}
    found = find_settings(config(str(tiny("spatial")), methods))
    assert [(s.name, s.sampler) for s in found] == [("spatial", {}), ("few", {"num_steps": 3})]
    assert found[1].apply(config()).sampler == SAMPLER | {"num_steps": 3}


def test_the_methods_of_the_frontier_are_ones_that_a_sampler_takes():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        found = find_settings(compose("frontier"))
    assert {setting.checkpoint for setting in found} == set(SHIPPED)
    for setting in found:
        SamplerConfig(**{k: v for k, v in setting.sampler.items() if k != "_target_"})


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (None, "There is nothing to draw from: expected checkpoints="),
        ({"a": "RUN"}, "The method 'a' has no checkpoint: expected methods={plain"),
        (
            {"a": {"checkpoint": "R", "sampler": {"steps": 3}}},
            "Unknown config key 'sampler.steps': did you mean sampler.num_steps",
        ),
        (
            {"a": {"checkpoint": "R", "sampel": {}}},
            "Unknown key of the method 'a' 'sampel': did you mean sampler",
        ),
    ],
)
def test_bad_methods(methods, sentence):
    with pytest.raises((InputError, ConfigKeyError)) as error:
        find_settings(config(methods=methods))
    assert explain(error.value).startswith(sentence)


def test_results_depend_on_weights_images_and_sampler(tiny):
    def depend(variant: str, *overrides: str) -> str:
        return json.dumps(
            dependencies(composed("units", "checkpoint=x", *overrides), tiny(variant))
        )

    assert depend("spatial") == depend("spatial", "batch_size=3", "output=elsewhere")
    changes = [("pooled",), ("spatial", "seed=1"), ("spatial", "data.crops_per_photo=3")]
    changes += [("spatial", "sampler.num_steps=3"), ("spatial", "num_images=5")]
    found = {depend(*change) for change in changes}
    assert len(found | {depend("spatial")}) == len(changes) + 1


def test_a_model_of_several_layers_is_a_setting_for_each(tiny):
    values = {"num_steps": 3}
    one, several = Setting("one", str(tiny("spatial"))), Setting("all", str(tiny("layers")), values)
    assert each_layer([one, several]) == [
        replace(one, layer="layer4"),
        replace(several, name="all_layer4", layer="layer4"),
        replace(several, name="all_layer2", layer="layer2"),
    ]
    assert [setting.name for setting in each_layer([several])] == ["layer4", "layer2"]
    assert each_layer([several], only="layer2") == [replace(several, layer="layer2")]
