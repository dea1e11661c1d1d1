"""Table 1: how well each model reconstructs, beside what could be had at best and at worst.

python experiments/reconstruction.py checkpoints=[outputs/small] data=imagenette data.root=PATH

Each model is scored as evaluate.py does it, in a folder of its own below `output`; the same command
again goes on with the models that are not there yet. The table of all is written as Markdown, LaTeX
and CSV, and to Weights & Biases with wandb=true.
"""

import logging
from pathlib import Path

from omegaconf import DictConfig
from tqdm.auto import tqdm

from experiments.harness import find_models, publish, score
from featinv.cli.app import run_entry_point
from featinv.evaluation.set_metrics import distance_name
from featinv.evaluation.tables import format_interval
from featinv.utils.errors import InputError

log = logging.getLogger("reconstruction")

# Columns of the table: metric of metrics.json, and how it is called.
COLUMNS = {
    "spatial_cosine": "spatial cosine ↑",
    "pooled_cosine": "pooled cosine ↑",
    "relative_l2": "relative L2 ↓",
    "top1_agreement": "top-1 ↑",
    "top5_agreement": "top-5 ↑",
    "psnr": "PSNR ↑",
    "lpips": "LPIPS ↓",
    "diversity": "diversity",
}
SETS = {"fd": "↓", "kid": "↓", "precision": "↑", "recall": "↑"}  # and where the best is


def table_rows(results: dict[str, dict]) -> list[dict[str, str]]:
    """Return the table as text: the models, then ceiling, codec and floor of each backbone."""

    def cells(metrics: dict, row: str) -> dict[str, str]:
        scores = metrics["rows"].get(row, {})
        own = {COLUMNS[name]: format_interval(**scores[name]) for name in COLUMNS if name in scores}
        return own | {
            f"{distance_name(name, extractor)} {best}": f"{sets[row][name]:.3g}"
            for extractor, sets in metrics["sets"].items()
            for name, best in SETS.items()
            if name in sets.get(row, {})
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
    models = find_models(config.checkpoints)
    output = Path(config.output)
    results: dict[str, dict] = {}
    for name, checkpoint in tqdm(models.items(), unit="model", desc="reconstruction"):
        metrics = score(name, checkpoint, config, output / name)
        if metrics is not None:
            results[name] = metrics
    if not results:
        raise InputError(f"There is nothing to score in {config.checkpoints}: only priors.")
    rows = table_rows(results)
    first = next(iter(results.values()))
    about = (
        f"{first['num_images']} images, {first['num_samples']} samples each, seed {config.seed}; "
        "mean over images with 95% bootstrap interval. Sets of images (first samples) are "
        f"compared in the features of {', '.join(config.extractors)}."
    )
    publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "reconstruction")
