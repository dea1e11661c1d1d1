"""Every command that the README and the documentation show is one that its script takes."""

import json
import re
import shlex

import pytest
from helpers import ROOT
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from featinv.cli.app import CONFIGS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLAIN = "featinv-convert"  # whose arguments are not Hydra's


def commands() -> list[str]:
    """Return the commands of all pages that start one of our scripts, without their comments."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        for line in lines:
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if is_ours(words, i)]
            if starts:
                found.append(shlex.join(words[starts[0] :]))
    return found


def is_ours(words: list[str], i: int) -> bool:
    return words[i].startswith("featinv-") or (words[i] == "python" and i + 1 < len(words))


def config_of(words: list[str]) -> tuple[str | None, list[str]]:
    """Return the config of a command, and its overrides."""
    if words[0].startswith("featinv-"):
        name, rest = words[0].removeprefix("featinv-"), words[1:]
    else:
        script = words[2] if words[1] == "-m" else words[1]
        name, rest = script.removesuffix(".py").split("/")[-1].split(".")[-1], words[2:]
    name = {"explore": "explorer", "reproduce": "reproduce/reproduce"}.get(name, name)
    return name, [word for word in rest if "=" in word or word.startswith("~")]


def test_every_experiment_is_shown():
    shown = {config_of(shlex.split(command))[0] for command in commands()}
    pages = "\n".join(page.read_text() for page in PAGES)
    written = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {
        "drawing",
        "harness",
        "settings",
        "workloads",
    }
    assert {name for name in written if name not in pages} == set()
    assert {"train", "evaluate", "explorer"} <= shown


@pytest.mark.parametrize("command", commands())
def test_a_command_is_taken(command):
    words = shlex.split(command)
    name, overrides = config_of(words)
    if words[0] == PLAIN:
        return
    config = CONFIGS / name
    parsed = OverridesParser.create().parse_overrides(
        [value for value in overrides if "tag(" not in value]  # Optuna's own
    )
    first, *_ = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.parent), version_base=None):
        compose(config.name, list(first[0]))


def test_the_documentation_builds_without_a_warning(tmp_path):
    config = pytest.importorskip("mkdocs.config", reason="mkdocs is not installed")
    build = pytest.importorskip("mkdocs.commands.build")
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    page = (tmp_path / "api" / "models" / "index.html").read_text()
    assert 'id="featinv.models.featinv.FeatInv"' in page


@pytest.mark.slow
def test_the_notebook_runs():
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.reads(json.dumps(json.loads((ROOT / "docs/tour.ipynb").read_text())), 4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3
