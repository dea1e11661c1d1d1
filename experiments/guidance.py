"""How strong to guide, and how often to drop the condition in training for it.

python experiments/guidance.py checkpoints=[outputs/dropout] data=imagenette data.root=PATH \
    data.val_shards=imagenette-train-0007.tar

Takes the models of a sweep, `train.py -m experiment=small model.cond_drop_prob=0,0.1,0.3`; draws
with each scale of classifier-free guidance. To choose by it, draw held-out images of the train
split. Each is scored as evaluate.py does it, in a folder of its own below `output`; the same
command again goes on with those that are not there yet.
"""

from pathlib import Path

from matplotlib.figure import Figure
from omegaconf import DictConfig

import harness
from featinv.checkpoints import load_model
from featinv.cli.app import run_entry_point
from featinv.evaluation.figures import save_figure, style_axes
from featinv.evaluation.plots import new_figure, plot_intervals
from featinv.evaluation.report import headline
from featinv.utils.errors import InputError
from settings import Setting, find_models, refuse_single


def guidance_figure(grid: dict[str, dict[float, dict]], dropout: dict[str, float]) -> Figure:
    """Draw cosine against guidance, a line for each model, with 95% bands."""
    figure, ax = new_figure(4, 2.8)
    for name, results in grid.items():
        cells = [m["rows"]["reconstruction"]["spatial_cosine"] for m in results.values()]
        label = f"{name} (dropout {dropout[name]:g})"
        plot_intervals(ax, list(results), cells, marker=".", label=label)
    style_axes(ax, "guidance scale", "spatial feature cosine")
    ax.legend(fontsize=6, frameon=False)
    return figure


def main(config: DictConfig) -> None:
    """Score every model at every scale, then write table and figure."""
    scales = sorted(set(config.scales))
    if not scales or not all(isinstance(scale, int | float) for scale in scales):
        raise InputError(f"scales is {scales}, expected numbers, for example [1,1.75,3].")
    refuse_single(config, guidance_scale="scales")
    models = find_models(config.checkpoints)
    dropout = {name: load_model(path).cond_drop_prob for name, path in models.items()}
    settings = {
        (name, scale): Setting(f"{name}_{scale:g}", path, {"guidance_scale": scale})
        for name, path in models.items()
        for scale in scales
    }
    scored = harness.score_all(list(settings.values()), config)
    harness.check_one_layer(scored)
    grid = {name: {s: scored[settings[name, s].name] for s in scales} for name in models}
    rows = [
        {"model": name, "dropout": f"{dropout[name]:g}", "guidance": f"{scale:g}"}
        | headline(metrics)
        for name, results in grid.items()
        for scale, metrics in results.items()
    ]
    first = next(iter(scored.values()))
    about = f"Backbone {first['backbone']}, layer {first['layer']}; {harness.scored_caption(first)}"
    path = Path(config.output) / "cosine_against_guidance.png"
    save_figure(guidance_figure(grid, dropout), path)
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "guidance")
