from featinv.evaluation.runs import differences, find_runs


def test_differences_name_each_value_once_and_all_of_them():
    configs = [
        {"seed": 0, "model.seed": 0, "data.seed": 5, "a.x": 1, "same": 2},
        {"seed": 1, "model.seed": 1, "data.seed": 5, "b.x": 1, "same": 2},
    ]
    assert differences(configs) == {"seed": ["0", "1"], "a.x": ["1", ""], "b.x": ["", "1"]}
    configs[1]["data.seed"] = 6
    assert differences(configs)["data.seed"] == ["5", "6"]


def test_a_class_stands_for_what_others_lack():
    network = {"unet._target_": "UNet", "unet.channels": 8, "lr": 1}
    priors = [{"unet._target_": "load", "unet.path": path, "lr": 2} for path in ("a", "a", "b")]
    classes = {"unet._target_": ["UNet", "load", "load"], "lr": ["1", "2", "2"]}
    assert differences([network, *priors[:2]]) == classes
    assert differences([network, *priors[1:]]) == classes | {"unet.path": ["", "a", "b"]}


def test_runs_are_found_once_and_not_in_what_hydra_and_wandb_keep(tmp_path):
    run = tmp_path / "wandb" / "run"  # above a run, the name means nothing
    for folder in (run, run / ".hydra", run / "wandb" / "offline-run-1" / "files"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    assert find_runs([str(run), str(run)]) == [run]
