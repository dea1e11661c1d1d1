"""Fidelity against realism against time: plain, guided without training, and the hybrid of both.

python experiments/frontier.py checkpoint=RUN prior=PRIOR data=imagenette data.root=PATH

Plain is the conditional sampler alone; training-free is the prior with feature guidance; the hybrid
is the conditional sampler with feature guidance on top. Each setting is scored in a folder of its
own below `output`; the same command again goes on with those that are missing.
"""

import logging
from itertools import product
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm

from experiments.reconstruction import score
from featinv.cli import command, run_entry_point
from featinv.report import format_interval, save_figure, save_tables

log = logging.getLogger("frontier")


def settings(config: DictConfig) -> dict[str, tuple[str, str, dict]]:
    """Return name -> method, checkpoint and the sampler's values that differ."""
    found: dict[str, tuple[str, str, dict]] = {"plain": ("plain", config.checkpoint, {})}
    methods = {"hybrid": config.checkpoint, "training-free": config.prior}
    for method, checkpoint in methods.items():
        if checkpoint is None:
            continue
        for scale, iterations, steps in product(
            config.scales, config.iterations, config.guided_steps
        ):
            values = {
                "feature_guidance_scale": float(scale),
                "feature_guidance_iterations": iterations,
                "feature_guidance_steps": steps,
            }
            where = "all" if steps is None else f"last_{steps}"
            found[f"{method}_{scale:g}_x_{iterations}_{where}"] = (method, checkpoint, values)
    return found


def table_rows(results: dict[str, tuple[str, dict]]) -> list[dict[str, str]]:
    """Return the table, as text."""
    rows = []
    for method, metrics in results.values():
        sampler, scores = metrics["sampler"], metrics["rows"]["reconstruction"]
        guided = sampler["feature_guidance_scale"] > 0
        row = {
            "method": method,
            "scale": f"{sampler['feature_guidance_scale']:g}",
            "iterations": str(sampler["feature_guidance_iterations"]) if guided else "0",
            "guided steps": str(
                (sampler["feature_guidance_steps"] or sampler["num_steps"]) if guided else 0
            ),
            "spatial cosine": format_interval(**scores["spatial_cosine"]),
            "top-1 agreement": format_interval(**scores["top1_agreement"]),
        }
        row |= {f"fd_{j}": f"{s['reconstruction']['fd']:.1f}" for j, s in metrics["sets"].items()}
        rows.append(row | {"s per image": f"{metrics['seconds_per_reconstruction']:.2f}"})
    return rows


def figure(results: dict[str, tuple[str, dict]], judge: str) -> Figure:
    """Draw cosine against Frechet distance, a point for each setting, its area the seconds."""
    figure = Figure(figsize=(4.5, 3.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for method in dict.fromkeys(method for method, _ in results.values()):
        own = [metrics for name, metrics in results.values() if name == method]
        x = [metrics["sets"][judge]["reconstruction"]["fd"] for metrics in own]
        y = [metrics["rows"]["reconstruction"]["spatial_cosine"]["mean"] for metrics in own]
        seconds = [metrics["seconds_per_reconstruction"] for metrics in own]
        ax.scatter(x, y, s=[20 + 20 * s for s in seconds], alpha=0.7, label=method)
        for a, b, s in zip(x, y, seconds, strict=True):
            ax.annotate(f"{s:.1f} s", (a, b), (4, 4), textcoords="offset points", fontsize=6)
    ax.set_xlabel(f"Frechet distance to the originals (fd_{judge}), lower is better", size=8)
    ax.set_ylabel("spatial feature cosine", size=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.legend(fontsize=7, frameon=False)
    return figure


def main(config: DictConfig) -> None:
    """Score every setting, then write table and figure."""
    output = Path(config.output)
    results: dict[str, tuple[str, dict]] = {}
    found = settings(config)
    for name, (method, checkpoint, values) in tqdm(found.items(), unit="setting", desc="frontier"):
        changed = OmegaConf.merge(config, {"sampler": values})
        results[name] = (method, score(name, checkpoint, changed, output / name))
    rows = table_rows(results)
    first = results["plain"][1]
    about = (
        f"{first['num_images']} images, {first['num_samples']} sample(s) each, seed {config.seed}; "
        f"{first['sampler']['scheduler']}, {first['sampler']['num_steps']} steps; on "
        f"{first['device']}; mean over images with 95% bootstrap interval.\n\n"
        f"Made by `{command()}`."
    )
    for judge in first["sets"]:
        save_figure(figure(results, judge), output / f"frontier_{judge}.png")
    print(f"\n{save_tables(rows, about, output)}")
    log.info("Tables and figures are in %s", output)


if __name__ == "__main__":
    run_entry_point(main, "frontier")
