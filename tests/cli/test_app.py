import logging
import warnings

import pytest
from helpers import mistake, run
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from featinv.cli.user_errors import cause_of
from featinv.utils.errors import InputError


def nothing(config) -> None:
    """A task that does nothing with its config."""


@pytest.fixture
def output(tmp_path) -> str:
    return f"output={tmp_path / 'run'}"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("maxsteps=3", "Unknown config key 'maxsteps': did you mean trainer.max_steps?"),
        ("qqq=1", "Unknown config key 'qqq': see --help for all keys."),
        ("data=imagenette data.rot=x", "Unknown config key 'data.rot': did you mean data.root"),
        ("backbone=resnet5O", "Unknown backbone config 'resnet5O': did you mean resnet50"),
        ("data=imagenette", "The value of data.root is missing: set it with data.root=..."),
        ("evaluation=none", "evaluation is 'none', expected dict, for example {'num_images': 64,"),
        ("data.batch_size=1.5", "data.batch_size is '1.5', expected int, for exampl"),
        ("seed", "Error parsing override 'seed' missing EQUAL"),
    ],
)
def test_bad_overrides(capsys, output, overrides, sentence):
    found = mistake(capsys, "train", output, *overrides.split(), task=nothing)
    assert found.startswith(sentence)


def test_values_are_converted(output):
    values = {
        "trainer.max_steps": ("1e5", 100_000),
        "trainer.devices": ("[0,1]", [0, 1]),
        "backbone.layer": ("[layer2,layer4]", ["layer2", "layer4"]),
        "trainer.precision": ("32", "32"),
        "sampler.guidance_scale": ("2", 2.0),
        "evaluation.num_images": ("null", None),
        "+trainer.max_time": ("1", 1),
    }
    configs = []
    run("train", output, *(f"{key}={v[0]}" for key, v in values.items()), task=configs.append)
    for key, (_, value) in values.items():
        found = OmegaConf.select(configs[0], key.lstrip("+"))
        assert repr(found) == repr(value), key  # the type too


def test_an_output_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    sentence = mistake(capsys, "train", f"output={tmp_path}/file/run", task=nothing)
    assert sentence.startswith(f"Cannot use '{tmp_path}/file/run': Not a directory")


def test_each_way_that_a_task_ends(capsys, output):
    def bad_input(config):
        raise InputError("This is\n wrong.")

    def unknown_key(config):
        OmegaConf.merge(config, {"sampler": {"steps": 3}})

    def bug(config):
        raise RuntimeError("a bug")

    def interrupted(config):
        raise KeyboardInterrupt

    assert mistake(capsys, "train", output, task=bad_input) == "This is wrong."
    said = mistake(capsys, "train", output, task=unknown_key)
    assert said.startswith("Unknown config key 'sampler.steps': did you mean sampler.num_steps")
    with pytest.raises(RuntimeError, match="a bug"):
        run("train", output, task=bug)
    with pytest.raises(SystemExit) as end:
        run("train", output, task=interrupted)
    assert end.value.code == 130


def test_only_known_noise_is_silenced(output):
    seen = []

    def task(config):
        with warnings.catch_warnings(record=True) as caught:  # by the filters in force
            warnings.warn("Found 70 module(s) in eval mode at the start of training.", stacklevel=1)
            warnings.warn("something of interest", stacklevel=1)
        seen.extend(str(warning.message) for warning in caught)
        lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        seen.append((lightning.isEnabledFor(logging.INFO), lightning.isEnabledFor(logging.WARNING)))

    run("train", output, task=task)
    assert seen == ["something of interest", (False, True)]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"_target_": "featinv.diffusion.Diffusion", "prediction_type": "v"}, "v_prediction"),
        ({"_target_": "featinv.sampling.SamplerConfig", "steps": 3}, "'steps'"),
        ({"_target_": "torch.optim.SGD", "params": [], "lr": -1.0}, "learning rate: -1.0"),
    ],
)
def test_the_cause_of_an_error_is_what_the_user_can_fix(config, sentence):
    with pytest.raises(InstantiationException) as caught:
        instantiate(config)
    assert isinstance(cause_of(caught.value), InputError)
    assert sentence in str(cause_of(caught.value))


def test_the_cause_of_a_bug_is_the_bug_itself():
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "operator.truediv", "_args_": [1, 0]})
    assert isinstance(cause_of(caught.value), ZeroDivisionError)
