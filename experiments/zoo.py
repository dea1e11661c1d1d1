"""Write the page of the model zoo: every trained model with its scores and its command.

python experiments/zoo.py runs=[outputs]

Lists all finished runs below the given folders: classifiers of train_backbone.py, and models of
train.py. The scores are those of the runs' own `metrics.json`, the hours those of their logs.
"""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml
from omegaconf import DictConfig

from compare import effort
from featinv.checkpoints import MODEL_FILE, NAMES
from featinv.cli.app import command, run_entry_point
from featinv.evaluation.report import headline
from featinv.evaluation.runs import find_runs
from featinv.evaluation.tables import bullets, format_interval, markdown_table
from featinv.utils.errors import InputError
from featinv.utils.files import write_text
from featinv.utils.paths import find_near, hide_folders
from settings import as_list

CLASSIFIERS = (
    "Accuracy is the share of validation images whose label is first of all classes; mean with 95% "
    "bootstrap interval."
)
MODELS = (
    "Accuracy is the classifier's, if its run is at hand. The scores compare reconstructions with "
    "their originals as by evaluate.py; mean over images with 95% bootstrap interval."
)


def read(path: Path) -> dict:
    """Return the contents of a YAML or JSON file; nothing if it is missing."""
    parse = json.loads if path.suffix == ".json" else yaml.safe_load
    return parse(path.read_text()) if path.is_file() else {}


def accuracy(metrics: Mapping) -> str:
    """Return the accuracy that train_backbone.py measured, as text; empty if there is none."""
    return format_interval(**metrics["accuracy"]) if "accuracy" in metrics else ""


def costs(run: Path, config: Mapping, metrics: Mapping) -> dict[str, str]:
    """Return how long a run trained, on how many images, and the size of its weights."""
    spent = effort(run, config)
    images = metrics.get("images_seen", spent.get("images"))
    return {
        "hours": f"{spent['hours']:.2f}" if spent else "",
        "images seen": f"{images:,}" if images else "",
        "MB": f"{(run / MODEL_FILE).stat().st_size / 1e6:.1f}",
    }


def classifier_row(run: Path, config: Mapping, metrics: Mapping) -> dict[str, str]:
    """Return the row of a run of train_backbone.py."""
    return {
        "architecture": config["name"],
        "pixels": str(config["backbone"]["image_size"]),
        "accuracy": accuracy(metrics),
    }


def model_row(run: Path, config: Mapping, metrics: Mapping) -> dict[str, str]:
    """Return the row of a run of train.py."""
    backbone = config["model"]["backbone"]
    layer = backbone.get("layer", "last")
    weights, classifier = backbone.get("weights", "timm"), {}
    if weights not in NAMES:  # a file: of a run of train_backbone.py
        classifier = read(Path(find_near(weights, run / "config.yaml")).parent / "metrics.json")
    return {
        "backbone": backbone.get("name", ""),
        "layer": layer if isinstance(layer, str) else ", ".join(layer),
        "conditioning": config["model"]["conditioning"],
        "accuracy": accuracy(classifier),
        **(headline(metrics) if metrics else {}),
    }


def made_by(run: Path, metrics: Mapping) -> str:
    """Return the command of a run; Hydra knows that of a run without an evaluation."""
    words = ["python", "train.py", *(read(run / ".hydra" / "overrides.yaml") or [])]
    return metrics.get("command", shlex.join(words))


def main(config: DictConfig) -> None:
    """Write the page."""
    folders = as_list(config.runs)
    runs = [run for run in find_runs(folders) if (run / MODEL_FILE).is_file()]
    if not runs:
        raise InputError(f"No run in {folders} is finished: expected {MODEL_FILE} in one.")
    above = os.path.commonpath([run.absolute().parent for run in runs])
    text = "# Model zoo\n\n"
    text += (
        f"Written by `{command()}` from the `config.yaml`, `metrics.json` and logs of the runs.\n"
    )
    for title, make_row, about in (
        ("Inverters and priors", model_row, MODELS),
        ("Classifiers", classifier_row, CLASSIFIERS),
    ):
        rows, commands = [], []
        for run in runs:
            values, metrics = read(run / "config.yaml"), read(run / "metrics.json")
            if ("model" in values) == (make_row is model_row):
                args, name = (run, values, metrics), os.path.relpath(run, above)
                rows.append({"run": name, **make_row(*args), **costs(*args)})
                commands.append(f"`{name}`: `{made_by(run, metrics)}`")
        if rows:
            text += f"\n## {title}\n\n{markdown_table(rows)}\n{about}\n\nMade by\n\n"
            text += f"{bullets(commands)}\n"
    page = Path(config.output) / "zoo.md"
    write_text(page, hide_folders(text))
    print(f"{len(runs)} runs are in {page}.")


if __name__ == "__main__":
    run_entry_point(main, "zoo")
