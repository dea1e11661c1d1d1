"""The package at home outside its checkout: built, installed and run in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import ROOT
from skimage import data, io

pytestmark = pytest.mark.slow


SOURCES = ("featinv", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def call(*command: object, cwd: Path, path: str | None = None) -> str:
    """Return what a command says, with another `PYTHONPATH` than this checkout's."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {} if path is None else {"PYTHONPATH": path}
    process = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel, and this one's packages beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, "."]
    call(*build, cwd=folder / "source", path=os.environ.get("PYTHONPATH"))
    venv = folder / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=folder)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python"]
    call(*pip, "install", "--no-deps", "--no-index", *folder.glob("*.whl"), cwd=folder)
    # Files in this path are not read: an editable install stays out.
    (site,) = venv.glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return venv / "bin"


QUICK = ["checkpoint=imagenette-small", "images=photo.png", "num_samples=1", "sampler.num_steps=2"]
QUICK += ["witnesses=[]", "precision=32-true", "device=cpu", "output=out"]


def test_a_photograph_is_inverted_in_an_empty_folder(installed, tmp_path):
    io.imsave(tmp_path / "photo.png", data.astronaut())
    call(installed / "featinv-evaluate", *QUICK, cwd=tmp_path)
    assert (tmp_path / "out" / "reconstructions.png").is_file()
    assert "Made by `featinv-evaluate checkpoint=" in (tmp_path / "out" / "table.md").read_text()
    where = call(
        installed / "python", "-c", "import featinv; print(featinv.__file__)", cwd=tmp_path
    )
    assert Path(where).is_relative_to(installed.parent)


def test_a_sweep_starts_its_jobs_from_the_package(installed, tmp_path):
    io.imsave(tmp_path / "photo.png", data.astronaut())
    assert "| finished" in call(installed / "featinv-evaluate", "-m", *QUICK, cwd=tmp_path)


@pytest.mark.parametrize("program", ["train", "explore", "convert"])
def test_every_command_is_there(installed, tmp_path, program):
    assert "help" in call(installed / f"featinv-{program}", "--help", cwd=tmp_path)
