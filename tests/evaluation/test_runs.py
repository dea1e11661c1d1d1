import pytest
import yaml

from featinv.evaluation.runs import differences, find_runs, load_config
from featinv.utils.errors import InputError


def test_differences_name_each_value_once():
    configs = [
        {"seed": 0, "model.seed": 0, "data.seed": 5, "a.x": 1, "same": 2},
        {"seed": 1, "model.seed": 1, "data.seed": 5, "b.x": 1, "same": 2},
    ]
    assert differences(configs) == {"seed": ["0", "1"], "a.x": ["1", ""], "b.x": ["", "1"]}
    configs[1]["data.seed"] = 6
    assert differences(configs)["data.seed"] == ["5", "6"]


def test_a_class_stands_for_options_that_other_classes_lack():
    network = {"unet._target_": "UNet", "unet.channels": 8, "lr": 1}
    priors = [{"unet._target_": "load", "unet.path": path, "lr": 2} for path in ("a", "a", "b")]
    classes = {"unet._target_": ["UNet", "load", "load"], "lr": ["1", "2", "2"]}
    assert differences([network, *priors[:2]]) == classes
    assert differences([network, *priors[1:]]) == classes | {"unet.path": ["", "a", "b"]}


def test_a_config_is_flattened_without_what_does_not_affect_results(tmp_path):
    config = {"output": str(tmp_path), "logger": {"name": "x"}, "model": {"lr": 0.1, "codec": {}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_config(tmp_path) == {"model.lr": 0.1, "model.codec": {}}
    (tmp_path / "config.yaml").write_text("[]")
    with pytest.raises(InputError, match="is not the config of a run"):
        load_config(tmp_path)


def test_runs_are_found_once_and_not_in_the_folders_of_hydra_and_wandb(tmp_path):
    run = tmp_path / "wandb" / "run"  # above a run, the name does not matter
    for folder in (run, run / ".hydra", run / "wandb" / "offline-run-1" / "files"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    assert find_runs([str(run), str(run)]) == [run]
