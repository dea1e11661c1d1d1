import logging
import re
import warnings

import pytest
from helpers import mistake, run
from omegaconf import OmegaConf

from featinv.utils.errors import InputError


def nothing(config) -> None:
    """A task that asks nothing of its config."""


def says(capsys, *overrides: str, name: str = "train", task=nothing) -> str:
    return mistake(capsys, name, *overrides, task=task)


@pytest.fixture
def output(tmp_path) -> str:
    return f"output={tmp_path / 'run'}"


def test_a_task_gets_the_config_of_the_command_line(output):
    configs = []
    run("train", "seed=3", "sampler=ddim", output, task=configs.append)
    assert configs[0].seed == 3
    assert configs[0].sampler.scheduler == "ddim"
    assert output == f"output={configs[0].output}"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("maxsteps=3", "Unknown config key 'maxsteps': did you mean trainer.max_steps?"),
        (
            "trainer.max_step=3",
            r"Unknown config key 'trainer.max_step': did you mean trainer.max_s",
        ),
        ("qqq=1", "Unknown config key 'qqq': see --help for all keys."),
        ("backbone=resnet5O", "Unknown backbone config 'resnet5O': did you mean resnet50"),
        ("data=imagenett", "Unknown data config 'imagenett': did you mean imagenette, imagenet?"),
        ("logger=none", "Unknown logger config 'none': choose from files, wandb."),
        ("data=imagenette", "The value of data.root is missing: set it with data.root=..."),
        ("evaluation=none", "evaluation is 'none', expected dict, for example {'num_images': 64,"),
        ("data.batch_size=many", "data.batch_size is 'many', expected int, for exampl"),
        ("data.batch_size=1.5", "data.batch_size is '1.5', expected int, for exampl"),
        ("data.batch_size=true", "data.batch_size is 'True', expected int, for exampl"),
        (
            "data.vertical_flip=no way",
            "data.vertical_flip is 'no way', expected bool, for example F",
        ),
        ("data.min_scale=low", "data.min_scale is 'low', expected float, for example 0.1."),
        ("conditioning=[1]", r"conditioning is '\[1\]', expected str, for example spatial."),
        ("seed", "Error parsing override 'seed' missing EQUAL"),
    ],
)
def test_bad_overrides(capsys, output, override, sentence):
    assert re.match(sentence, says(capsys, output, override))


def test_keys_of_the_chosen_option_are_offered(capsys, output):
    sentence = says(capsys, output, "data=imagenette", "data.rot=x")
    assert sentence.startswith("Unknown config key 'data.rot': did you mean data.root")


def test_a_group_that_the_entry_point_does_not_have(capsys, output):
    sentence = says(capsys, output, "checkpoint=x", "model=small", name="evaluate")
    assert sentence.startswith("Could not override 'model'. No match in the defaults list.")


def test_a_missing_checkpoint_value(capsys, output):
    assert says(capsys, output, "checkpoint=???", name="evaluate") == (
        "The value of checkpoint is missing: set it with checkpoint=..."
    )


def test_whole_numbers_may_be_written_as_floats(output):
    configs = []
    run("train", "trainer.max_steps=1e5", output, task=configs.append)
    assert configs[0].trainer.max_steps == 100_000
    assert isinstance(configs[0].trainer.max_steps, int)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("trainer.devices=auto", "trainer.devices", "auto"),
        ("trainer.devices=[0,1]", "trainer.devices", [0, 1]),
        ("backbone.layer=[layer2,layer4]", "backbone.layer", ["layer2", "layer4"]),
        ("trainer.precision=32", "trainer.precision", "32"),
        ("sampler.guidance_scale=2", "sampler.guidance_scale", 2.0),
        ("evaluation.num_images=null", "evaluation.num_images", None),
        ("+trainer.max_time=1", "trainer.max_time", 1),
        ("model.unet.block_out_channels=[1]", "model.unet.block_out_channels", [1]),
        ("model/unet=prior model.unet.path=x", "model.unet.path", "x"),
    ],
)
def test_values_of_another_kind_that_are_right(output, override, key, value):
    configs = []
    run("train", output, *override.split(), task=configs.append)
    assert OmegaConf.select(configs[0], key) == value


def test_an_output_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    sentence = says(capsys, f"output={tmp_path}/file/run")
    assert sentence.startswith(f"Cannot use '{tmp_path}/file/run': Not a directory")


def test_an_input_error_ends_in_its_sentence(capsys, output):
    def task(config):
        raise InputError("This is\n wrong.")

    assert says(capsys, output, task=task) == "This is wrong."


def test_a_bug_keeps_its_traceback(output):
    def task(config):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run("train", output, task=task)


def test_an_interruption_exits_with_130(output):
    def task(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run("train", output, task=task)
    assert end.value.code == 130


def test_noise_is_silenced_and_warnings_are_not(output):
    seen = []

    def task(config):
        with warnings.catch_warnings(record=True) as caught:
            # no "always" here: the filters in force are what is tested
            warnings.warn("Found 70 module(s) in eval mode at the start of training.", stacklevel=1)
            warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", stacklevel=1)
            warnings.warn("something of interest", stacklevel=1)
        seen.extend(str(warning.message) for warning in caught)
        lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        seen.append((lightning.isEnabledFor(logging.INFO), lightning.isEnabledFor(logging.WARNING)))

    run("train", output, task=task)
    assert seen == ["something of interest", (False, True)]
