"""Table 1: how well each model reconstructs, beside what could be had at best and at worst.

python experiments/reconstruction.py checkpoints=[outputs/small] data=imagenette data.root=PATH

Each model is scored as evaluate.py does it, in a folder of its own below `output`; the same command
again goes on with the models that are not there yet. The table of all is written as Markdown, LaTeX
and CSV, and to Weights & Biases with logger=wandb.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import wandb
from omegaconf import DictConfig, ListConfig
from tqdm.auto import tqdm

from featinv import FeatInv
from featinv.checkpoints import MODEL_FILE, SHIPPED
from featinv.cli import (
    command,
    make_batches,
    make_evaluation,
    pick_device,
    run_entry_point,
    sampler_options,
)
from featinv.errors import InputError
from featinv.report import format_interval, save_tables, table_cells

log = logging.getLogger("reconstruction")

# Columns of the table: metric of metrics.json, and how it is called.
COLUMNS = {
    "spatial_cosine": "spatial cosine ↑",
    "pooled_cosine": "pooled cosine ↑",
    "relative_l2": "relative L2 ↓",
    "top1_agreement": "top-1 ↑",
    "top5_agreement": "top-5 ↑",
    "diversity": "diversity",
}
SETS = {"fd": "fd_{} ↓", "kid": "kid_{} ↓", "precision": "precision_{} ↑", "recall": "recall_{} ↑"}


def find_models(paths: str | Sequence[str]) -> dict[str, str]:
    """Return name -> checkpoint of the models that are, or lie in, the given paths; no priors.

    Raises:
        InputError: There is none in one of them, or two have the same name.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    models: dict[str, str] = {}
    for path in paths:
        folders = [file.parent for file in sorted(Path(path).rglob(MODEL_FILE))]
        found = [path] if path in SHIPPED or Path(path).is_file() else list(map(str, folders))
        if not found:
            raise InputError(
                f"There is no model in '{path}': expected a run's folder, a folder with runs in "
                f"it, a checkpoint file, or {' or '.join(SHIPPED)}."
            )
        for checkpoint in found:
            name = Path(checkpoint).stem if Path(checkpoint).is_file() else Path(checkpoint).name
            if models.setdefault(name, checkpoint) != checkpoint:
                raise InputError(
                    f"Two models are called '{name}': '{models[name]}' and '{checkpoint}'; "
                    "expected names that differ."
                )
    return models


def score(name: str, checkpoint: str, config: DictConfig, folder: Path) -> dict | None:
    """Return the metrics of a model, computed now or before; None for what is no inverter."""
    path = folder / "metrics.json"
    if not path.is_file():
        model = FeatInv.load(checkpoint).to(pick_device(config.device))
        if not model.reconstructs(model.settings(**sampler_options(config))):
            log.info("%s is a prior: experiments/prior.py judges it", name)
            return None
        evaluation = make_evaluation(config, model)
        evaluation.run(make_batches(config, model), config.num_images)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"backbone": model.backbone.name, "layer": model.backbone.layer}
        about |= {"conditioning": model.conditioning, "data": dict(config.data)}
        evaluation.save(folder, command(), checkpoint=checkpoint, **about)
    metrics = json.loads(path.read_text())
    asked = {"num_images": config.num_images, "num_samples": config.num_samples}
    for key, value in {**asked, "seed": config.seed}.items():
        if value is not None and metrics[key] != value:
            raise InputError(
                f"'{path}' was made with {key}={metrics[key]}, not {value}: expected another "
                "output, or the same settings."
            )
    return metrics


def table_rows(results: dict[str, dict]) -> list[dict[str, str]]:
    """Return the table as text: the models, then ceiling, codec and floor of each backbone."""

    def cells(metrics: dict, row: str) -> dict[str, str]:
        scores = metrics["rows"].get(row, {})
        own = {COLUMNS[name]: format_interval(**scores[name]) for name in COLUMNS if name in scores}
        return own | {
            title.format(judge): f"{sets[row][name]:.3g}"
            for judge, sets in metrics["sets"].items()
            if row in sets
            for name, title in SETS.items()
        }

    rows = []
    references: dict[tuple[str, str], dict] = {}
    for name, metrics in results.items():
        about = {"backbone": metrics["backbone"], "model": f"{name} ({metrics['conditioning']})"}
        best = format_interval(**metrics["rows"]["best"]["spatial_cosine"])
        own = cells(metrics, "reconstruction")
        seconds = f"{metrics['seconds_per_reconstruction']:.2f}"
        rows.append(about | own | {"best of S ↑": best, "s per image": seconds})
        references.setdefault((metrics["backbone"], metrics["layer"]), metrics)
    for (backbone, _), metrics in references.items():
        for row in ("ceiling", "codec", "floor"):
            if row in metrics["rows"]:
                rows.append({"backbone": backbone, "model": row} | cells(metrics, row))
    return rows


def main(config: DictConfig) -> None:
    """Score every model, then write the table."""
    paths = config.checkpoints
    models = find_models(list(paths) if isinstance(paths, ListConfig) else paths)
    output = Path(config.output)
    results: dict[str, dict] = {}
    for name, checkpoint in tqdm(models.items(), unit="model", desc="reconstruction"):
        metrics = score(name, checkpoint, config, output / name)
        if metrics is not None:
            results[name] = metrics
    if not results:
        raise InputError(f"There is nothing to score in {paths}: only priors.")
    rows = table_rows(results)
    first = next(iter(results.values()))
    about = (
        f"{first['num_images']} images, {first['num_samples']} samples each, seed {config.seed}; "
        "mean over images with 95% bootstrap interval. Sets of images (first samples) are "
        f"compared in the features of {', '.join(config.judges)}.\n\nMade by `{command()}`."
    )
    text = save_tables(rows, about, output)
    if config.logger == "wandb":
        with wandb.init(project="featinv", job_type="reconstruction", dir=config.output) as run:
            columns, *cells = table_cells(rows)
            run.log({"reconstruction": wandb.Table(columns=columns, data=cells)})
    print(f"\n{text}")
    log.info("The tables are in %s", output)


if __name__ == "__main__":
    run_entry_point(main, "reconstruction")
