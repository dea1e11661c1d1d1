"""How many denoising steps an inversion needs: feature cosine against steps, by scheduler.

python experiments/steps.py checkpoint=RUN data=imagenette data.root=PATH num_images=64

The same images and the same noise for every row, so rows may be compared image by image.
"""

import csv
import logging
import time
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

from featinv import FeatInv
from featinv.cli.app import command, log_table, make_batches, run_entry_point
from featinv.evaluation.figures import save_figure, style_axes
from featinv.evaluation.tables import format_interval, markdown_table
from featinv.metrics import bootstrap_interval, spatial_cosine
from featinv.utils.devices import pick_device
from featinv.utils.errors import at_least
from featinv.utils.pixels import eight_bit, from_uint8

log = logging.getLogger("steps")


@torch.no_grad()
def measure(model: FeatInv, batches: list[dict], config: DictConfig) -> tuple[Tensor, float]:
    """Return the cosine of each image (mean over its samples), and seconds per reconstruction."""
    cosines, seconds = [], 0.0
    for batch in batches:
        features = model.backbone.features(from_uint8(batch["image"].to(model.device)))
        start = time.perf_counter()
        samples = model.invert(
            features,
            config.num_samples,
            seed=config.seed,
            indices=batch["index"].tolist(),
            batch_size=config.batch_size,
        )
        seconds += time.perf_counter() - start
        drawn = model.backbone.features(eight_bit(samples).flatten(0, 1))
        repeated = features.repeat_interleave(config.num_samples, 0)
        cosines.append(spatial_cosine(repeated, drawn).view(-1, config.num_samples).mean(1).cpu())
    cosine = torch.cat(cosines)
    return cosine, seconds / (len(cosine) * config.num_samples)


def figure(results: list[dict]) -> Figure:
    """Draw cosine against steps, a line for each scheduler, with 95% bands."""
    figure = Figure(figsize=(4, 2.8), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for scheduler in dict.fromkeys(row["scheduler"] for row in results):
        rows = sorted(
            (r for r in results if r["scheduler"] == scheduler), key=lambda r: r["num_steps"]
        )
        steps = [row["num_steps"] for row in rows]
        (line,) = ax.plot(steps, [row["mean"] for row in rows], marker=".", label=scheduler)
        low, high = [r["low"] for r in rows], [r["high"] for r in rows]
        ax.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    ax.set_xscale("log")
    ticks = sorted({row["num_steps"] for row in results})
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    style_axes(ax, "denoising steps", "spatial feature cosine")
    ax.legend(fontsize=7, frameon=False)
    return figure


def table_rows(results: list[dict]) -> list[dict[str, str]]:
    """Return the table, as text; differences are to the first row, image by image."""
    return [
        {
            "scheduler": row["scheduler"],
            "steps": str(row["num_steps"]),
            "spatial cosine": format_interval(row["mean"], row["low"], row["high"]),
            "difference to the first row": format_interval(*row["difference"]),
            "s per reconstruction": f"{row['seconds']:.3f}",
        }
        for row in results
    ]


def save(folder: Path, results: list[dict], about: str) -> None:
    """Write the rows so far: table, CSV and figure."""
    rows = table_rows(results)
    (folder / "table.md").write_text(f"{markdown_table(rows)}\n{about}\n")
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    save_figure(figure(results), folder / "cosine_against_steps.png")


def main(config: DictConfig) -> None:
    """Measure every scheduler and number of steps on the same images."""
    for number in config.steps:
        at_least("steps", number, 1)
    model = FeatInv.load(config.checkpoint).to(pick_device(config.device))
    trained = model.sampler.override(guidance_scale=config.sampler.guidance_scale)
    samplers = [  # all are made first, so that a wrong name is told now
        trained.override(scheduler=scheduler, num_steps=number, eta=0.0)
        for scheduler in config.schedulers
        for number in sorted(config.steps, reverse=True)
    ]
    batches = list(make_batches(config, model))
    results: list[dict] = []
    first = None
    for model.sampler in tqdm(samplers, unit="row", desc="steps"):
        cosine, seconds = measure(model, batches, config)
        first = cosine if first is None else first
        low, high = bootstrap_interval(cosine)
        difference = cosine - first
        results.append(
            {
                "scheduler": model.sampler.scheduler,
                "num_steps": model.sampler.num_steps,
                "mean": float(cosine.mean()),
                "low": low,
                "high": high,
                "difference": (float(difference.mean()), *bootstrap_interval(difference)),
                "seconds": seconds,
            }
        )
        about = (
            f"{len(cosine)} images, {config.num_samples} samples each, seed {config.seed}, "
            f"guidance {model.sampler.guidance_scale:g}, on {model.device.type}; mean over images "
            f"with 95% bootstrap interval. Backbone {model.backbone.name}, layer "
            f"{model.backbone.layer}; prediction {model.diffusion.prediction_type}, noise schedule "
            f"{model.diffusion.scheduler_config['beta_schedule']}.\n\nMade by `{command()}`."
        )
        save(Path(config.output), results, about)
    rows = table_rows(results)
    print(f"\n{markdown_table(rows)}\n{about}")
    log_table(rows, config)
    log.info("Table and figure are in %s", config.output)


if __name__ == "__main__":
    run_entry_point(main, "steps")
