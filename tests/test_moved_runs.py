"""A run that was moved finds what it stands on, or says what it misses."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from featinv import InputError
from featinv.checkpoints import build_model, load_model, read_checkpoint, save_model
from featinv.codecs import PATCH_PCA


@pytest.fixture
def project(tmp_path, tiny_model, tiny_config, monkeypatch) -> Path:
    """A prior, a backbone's weights, a codec's basis and a model on all, by relative paths.

    Once it is made, the working directory is another one.
    """
    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    monkeypatch.chdir(project)
    save_model(tiny_model, "runs/prior/model.safetensors")
    weights = tiny_model.backbone.model.state_dict().items()
    save_file({key: (value + 1).contiguous() for key, value in weights}, "backbone.safetensors")
    shutil.copy(PATCH_PCA, "basis.safetensors")
    tiny_config["backbone"]["weights"] = "backbone.safetensors"
    tiny_config["codec"]["basis"] = "basis.safetensors"
    unet = {"_target_": "featinv.checkpoints.load_prior", "path": "runs/prior"}
    model = build_model(tiny_config | {"unet": unet, "train_unet": False})
    save_model(model, "runs/model/model.safetensors")
    monkeypatch.chdir(tmp_path)
    return project


@pytest.mark.parametrize("moved", ["nothing", "all", "the model alone", "each file"])
def test_a_moved_run_loads(project, tmp_path, moved):
    folder, other = project / "runs" / "model", tmp_path / "other"
    hashes = load_model(folder).frozen_hashes()
    if moved == "all":
        folder = Path(shutil.move(project, other)) / "runs" / "model"
    elif moved == "the model alone":
        folder = shutil.move(folder, other)
    elif moved == "each file":
        shutil.move(project / "runs", other)
        shutil.move(project / "backbone.safetensors", other)
        shutil.move(project / "basis.safetensors", other)
        folder = other / "model"
    assert load_model(folder).frozen_hashes() == hashes
    save_model(load_model(folder), tmp_path / "again.safetensors")
    assert load_model(tmp_path / "again.safetensors").frozen_hashes() == hashes


@pytest.mark.parametrize(
    ("part", "file"),
    [("unet", "runs/prior"), ("backbone", "backbone.s"), ("codec", "basis.s")],
)
def test_what_a_run_misses_is_named_with_its_hash(project, part, file):
    folder = project / "runs" / "model"
    digest = read_checkpoint(folder / "model.safetensors")[1][part]
    for found in project.glob(f"{file}*"):
        found.rename(project / "elsewhere")
    with pytest.raises(InputError, match=f"'{project / file}.* SHA-256 {digest}"):
        load_model(folder)


def test_what_lies_beside_a_checkpoint_is_saved_relative_to_it(project):
    model = load_model(project / "runs" / "model")
    save_model(model, project / "model.safetensors")
    config = read_checkpoint(project / "model.safetensors")[0]
    assert config["unet"]["path"] == "{folder}/runs/prior"
    assert config["backbone"]["weights"] == "{folder}/backbone.safetensors"
    assert config["codec"]["basis"] == "{folder}/basis.safetensors"
