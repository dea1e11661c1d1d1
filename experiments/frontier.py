"""Fidelity against realism against time: plain, guided without training, and both together.

python experiments/frontier.py checkpoint=RUN prior=PRIOR data=imagenette data.root=PATH

`plain` is the conditional sampler alone, `training-free` the prior with feature guidance, `guided`
the conditional sampler with feature guidance. `methods` lists the settings. Each is scored in a
folder of its own below `output`; the same command continues with those that are missing.
"""

from matplotlib.figure import Figure
from omegaconf import DictConfig

import harness
from featinv.cli.app import run_entry_point
from featinv.evaluation.figures import save_figure
from featinv.evaluation.plots import new_figure, style_axes
from featinv.evaluation.report import headline
from featinv.evaluation.set_metrics import distance_name
from settings import find_settings


def frontier_figure(results: dict[str, dict], extractor: str) -> Figure:
    """Draw cosine against the distance of the sets, a numbered point for each setting.

    The distance is Frechet's or, for few images, the kernel distance. Settings that lack it are
    left out: the extractor took part in their training, so it is no witness for them.
    """
    figure, ax = new_figure(7, 3.6)
    sets = {
        name: metrics["sets"][extractor]["reconstruction"]
        for name, metrics in results.items()
        if extractor in metrics["sets"]
    }
    kind = "fd" if all("fd" in distances for distances in sets.values()) else "kid"
    methods = list(dict.fromkeys(name.split("_")[0] for name in results))
    for number, (name, metrics) in enumerate(results.items(), 1):  # as in the table
        if name not in sets:
            continue
        x = sets[name][kind]
        y = metrics["rows"]["reconstruction"]["spatial_cosine"]["mean"]
        colour = f"C{methods.index(name.split('_')[0])}"
        label = f"{number}  {name}, {metrics['seconds_per_reconstruction']:.1f} s"
        ax.scatter(x, y, s=30, alpha=0.7, color=colour, label=label)
        ax.annotate(str(number), (x, y), (4, 4), textcoords="offset points", fontsize=6)
    whole = {"fd": "Frechet", "kid": "kernel"}[kind]
    about = f"{distance_name(kind, extractor)}, lower is better"
    style_axes(ax, f"{whole} distance to the originals ({about})", "spatial feature cosine")
    figure.legend(fontsize=6, frameon=False, loc="outside right upper")
    return figure


def main(config: DictConfig) -> None:
    """Score every setting, write table and figures."""
    results = harness.score_all(find_settings(config), config)
    first = next(iter(results.values()))
    for extractor in dict.fromkeys(name for m in results.values() for name in m["sets"]):
        figure = frontier_figure(results, extractor)
        save_figure(figure, f"{config.output}/frontier_{extractor}.png")
    rows = [
        {"method": name}
        | headline(metrics)
        | {"s per image": f"{metrics['seconds_per_reconstruction']:.2f}"}
        for name, metrics in results.items()
    ]
    about = f"{harness.scored_caption(first)} {harness.layers_caption(results)}"
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "frontier")
