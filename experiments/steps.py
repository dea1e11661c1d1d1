"""How many denoising steps an inversion needs: feature cosine against steps, by scheduler.

python experiments/steps.py checkpoint=RUN data=imagenette data.root=PATH num_images=64

The same images and the same noise for every row, so rows may be compared image by image.
"""

from functools import partial
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

import harness
from featinv.cli.app import run_entry_point, sampler_options
from featinv.evaluation.draws import see
from featinv.evaluation.figures import save_figure, style_axes
from featinv.evaluation.plots import new_figure, plot_intervals
from featinv.evaluation.tables import format_interval
from featinv.models.base import Inverter
from featinv.utils.errors import at_least
from settings import (
    Setting,
    dependencies,
    open_model,
    refuse_single,
)


def invert(
    model: Inverter, features: Tensor, indices: Tensor, setting: Setting, config: DictConfig
) -> dict[str, Tensor]:
    """Return the cosine of each image, and seconds per reconstruction."""
    own = setting.apply(config)

    def rows(chunk: Tensor) -> dict[str, Tensor]:
        condition = features[chunk].to(model.device)
        draws = harness.draw_samples(model, condition, indices[chunk], own)
        seconds = torch.full((len(chunk),), draws.seconds / len(draws.images))
        return {"cosine": draws.cosine(condition), "seconds": seconds}

    return harness.in_chunks(len(features), config, rows)


def steps_figure(results: dict[tuple[str, int], dict[str, Tensor]]) -> Figure:
    """Draw cosine against steps, a line for each scheduler, with 95% bands."""
    figure, ax = new_figure(4, 2.8)
    for scheduler in dict.fromkeys(scheduler for scheduler, _ in results):
        steps = sorted(number for name, number in results if name == scheduler)
        cells = [harness.interval(results[scheduler, number]["cosine"]) for number in steps]
        plot_intervals(ax, steps, cells, marker=".", label=scheduler)
    ax.set_xscale("log")
    ticks = sorted({number for _, number in results})
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    style_axes(ax, "denoising steps", "spatial feature cosine")
    ax.legend(fontsize=7, frameon=False)
    return figure


def main(config: DictConfig) -> None:
    """Measure every scheduler and number of steps on the same images."""
    for number in config.steps:
        at_least("steps", number, 1)
    refuse_single(config, scheduler="schedulers", num_steps="steps")
    model = open_model(config.checkpoint, config)
    grid = list(product(config.schedulers, sorted(config.steps, reverse=True)))
    fixed = {"eta": config.sampler.eta or 0.0}  # most schedulers take no other
    settings = {
        f"{scheduler} {number}": Setting(
            "", config.checkpoint, {"scheduler": scheduler, "num_steps": number} | fixed
        )
        for scheduler, number in grid
    }
    for setting in settings.values():  # wrong names fail before anything is drawn
        model.settings(**sampler_options(setting.apply(config)))
    images = harness.load_images(config, model)
    features, _ = see(model.backbone, images["image"])
    rows = {
        name: partial(invert, model, features, images["index"], setting, config)
        for name, setting in settings.items()
    }
    measured = harness.measure(rows, dependencies(config, config.checkpoint), config)
    results = dict(zip(grid, measured.values(), strict=True))
    first = results[grid[0]]["cosine"]
    table = []
    for (scheduler, number), values in results.items():
        photographs = images["photograph"]
        difference = harness.interval(values["cosine"] - first, photographs)
        cells = {
            "spatial cosine": format_interval(**harness.interval(values["cosine"], photographs)),
            "difference to the first row": format_interval(**difference),
            "s per reconstruction": f"{values['seconds'].mean():.3f}",
        }
        table.append({"scheduler": scheduler, "steps": str(number)} | cells)
    save_figure(steps_figure(results), Path(config.output) / "cosine_against_steps.png")
    how = f"guidance {model.settings(**sampler_options(config)).guidance_scale:g}"
    about = (
        f"{harness.measured_caption(len(first), config, how)} On {model.device.type}. Backbone "
        f"{model.backbone.name}, layer {model.backbone.layer}; prediction "
        f"{model.diffusion.prediction_type}, noise schedule "
        f"{model.diffusion.scheduler_config['beta_schedule']}."
    )
    harness.publish(table, about, config)


if __name__ == "__main__":
    run_entry_point(main, "steps")
