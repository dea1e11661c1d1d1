"""Fidelity against realism against time: plain, guided without training, and the hybrid of both.

python experiments/frontier.py checkpoint=RUN prior=PRIOR data=imagenette data.root=PATH

Plain is the conditional sampler alone; training-free is the prior with feature guidance; the hybrid
is the conditional sampler with feature guidance on top. `methods` says which settings there are;
each is scored in a folder of its own below `output`, and the same command again goes on with those
that are missing.
"""

import logging
import re
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm

from experiments.harness import check_one_layer, find_methods, headline, publish, score
from featinv.cli.app import run_entry_point
from featinv.evaluation.figures import save_figure, style_axes
from featinv.evaluation.set_metrics import distance_name
from featinv.utils.errors import InputError

log = logging.getLogger("frontier")


def table_rows(results: dict[str, dict]) -> list[dict[str, str]]:
    """Return the table, as text."""
    rows = []
    for name, metrics in results.items():
        seconds = f"{metrics['seconds_per_reconstruction']:.2f}"
        rows.append({"method": name} | headline(metrics) | {"s per image": seconds})
    return rows


def figure(results: dict[str, dict], extractor: str) -> Figure:
    """Draw cosine against the distance of the sets, a numbered point for each setting.

    The distance is Frechet's, or for few images the kernel distance.
    """
    figure = Figure(figsize=(7, 3.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    sets = {name: metrics["sets"][extractor]["reconstruction"] for name, metrics in results.items()}
    kind = "fd" if all("fd" in distances for distances in sets.values()) else "kid"
    methods = list(dict.fromkeys(name.split()[0] for name in results))
    for number, (name, metrics) in enumerate(results.items(), 1):
        x = sets[name][kind]
        y = metrics["rows"]["reconstruction"]["spatial_cosine"]["mean"]
        colour = f"C{methods.index(name.split()[0])}"
        label = f"{number}  {name}, {metrics['seconds_per_reconstruction']:.1f} s"
        ax.scatter(x, y, s=30, alpha=0.7, color=colour, label=label)
        ax.annotate(str(number), (x, y), (4, 4), textcoords="offset points", fontsize=6)
    whole = {"fd": "Frechet", "kid": "kernel"}[kind]
    about = f"{distance_name(kind, extractor)}, lower is better"
    style_axes(ax, f"{whole} distance to the originals ({about})", "spatial feature cosine")
    figure.legend(fontsize=6, frameon=False, loc="outside right upper")
    return figure


def main(config: DictConfig) -> None:
    """Score every setting, then write table and figures."""
    output = Path(config.output)
    results: dict[str, dict] = {}
    found = find_methods(config)
    for name, (checkpoint, values) in tqdm(found.items(), unit="setting", desc="frontier"):
        changed = OmegaConf.merge(config, {"sampler": values})
        folder = output / re.sub(r"[^\w.-]+", "_", name)
        metrics = score(name, checkpoint, changed, folder)
        if metrics is None:
            raise InputError(f"'{name}' is a prior without guidance: expected a guided one.")
        results[name] = metrics
    check_one_layer(results)
    first = next(iter(results.values()))
    about = (
        f"{first['num_images']} images, {first['num_samples']} sample(s) each, seed {config.seed}; "
        f"on {first['device']} in {first['precision']}; mean over images with 95% bootstrap "
        "interval."
    )
    for extractor in first["sets"]:
        save_figure(figure(results, extractor), output / f"frontier_{extractor}.png")
    publish(table_rows(results), about, config)


if __name__ == "__main__":
    run_entry_point(main, "frontier")
