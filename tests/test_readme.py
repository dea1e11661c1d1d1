"""Every command of the README is one that its script takes."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from featinv.cli.app import CONFIGS


def commands() -> list[str]:
    """Return the README's commands that start one of our scripts, without their comments."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in joined(lines)]
    return [shlex.join(w) for w in words if w[:1] == ["python"] and script_of(w) is not None]


def joined(lines: list[str]) -> list[str]:
    """Join the lines that a quotation runs over."""
    whole: list[str] = []
    for line in lines:
        if whole and re.sub(r"(^|\s)#.*", "", whole[-1]).count("'") % 2:
            whole[-1] += f" {line.strip()}"
        else:
            whole.append(line)
    return whole


def script_of(words: list[str]) -> Path | None:
    """Return the script of a command with a config of its own."""
    name = "featinv/cli/explore.py" if words[1:3] == ["-m", "featinv.cli.explore"] else words[1]
    return Path(name) if name.endswith(".py") else None


def test_there_are_commands_of_every_kind():
    scripts = {script_of(shlex.split(command)).name for command in commands()}
    written = {path.name for path in (ROOT / "experiments").glob("*.py")}
    unwritten = (
        written - scripts - {"harness.py", "fit_codec.py", "linear_readout.py", "compare.py"}
    )
    assert unwritten == set(), "an experiment that the README does not show"
    assert {"train.py", "evaluate.py", "explore.py"} <= scripts


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_is_taken(command):
    words = shlex.split(command)
    script = script_of(words)
    assert (ROOT / script).is_file()
    config = CONFIGS / (
        "reproduce/reproduce"
        if script.stem == "reproduce"
        else {"explore": "explorer"}.get(script.stem, script.stem)
    )
    if not config.with_suffix(".yaml").is_file():
        pytest.skip("its arguments are plain paths")
    values = [word for word in words[2:] if "=" in word or word.startswith("~")]
    parsed = OverridesParser.create().parse_overrides(
        [value for value in values if "tag(" not in value]  # Optuna's own
    )
    first, *_ = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.parent), version_base=None):
        compose(config.name, list(first[0]))
