"""How strong to guide, and how often to drop the condition in training for it.

python experiments/guidance.py checkpoints=[outputs/dropout] data=imagenette data.root=PATH \
    data.val_shards=imagenette-train-0007.tar

Takes the models of a sweep over dropouts, as `train.py -m sweep=dropout_small` makes it, and draws
with each scale of classifier-free guidance. To choose by it, draw held-out images of the train
split. Each is scored as evaluate.py does it, in a folder of its own below `output`; the same
command again goes on with those that are not there yet.
"""

import logging
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm

from experiments.harness import check_one_layer, find_models, headline, publish, score
from featinv import FeatInv
from featinv.cli.app import run_entry_point
from featinv.evaluation.figures import save_figure, style_axes
from featinv.utils.errors import InputError

log = logging.getLogger("guidance")


def table_rows(results: dict[tuple[str, float], dict], dropout: dict[str, float]) -> list[dict]:
    """Return the table, as text.

    Args:
        results: Name of the model and guidance scale -> contents of metrics.json.
        dropout: Name of the model -> probability of dropping the condition in its training.
    """
    rows = []
    for (name, scale), metrics in results.items():
        about = {"model": name, "dropout": f"{dropout[name]:g}", "guidance": f"{scale:g}"}
        rows.append(about | headline(metrics))
    return rows


def figure(results: dict[tuple[str, float], dict], dropout: dict[str, float]) -> Figure:
    """Draw cosine against guidance, a line for each model, with 95% bands."""
    figure = Figure(figsize=(4, 2.8), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for name in dropout:
        scales = [scale for model, scale in results if model == name]
        found = [
            results[name, scale]["rows"]["reconstruction"]["spatial_cosine"] for scale in scales
        ]
        label = f"{name} (dropout {dropout[name]:g})"
        (line,) = ax.plot(scales, [values["mean"] for values in found], marker=".", label=label)
        low, high = ([values[key] for values in found] for key in ("low", "high"))
        ax.fill_between(scales, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    style_axes(ax, "guidance scale", "spatial feature cosine")
    ax.legend(fontsize=6, frameon=False)
    return figure


def main(config: DictConfig) -> None:
    """Score every model at every scale, then write table and figure."""
    output = Path(config.output)
    scales = list(config.scales)
    if not scales or not all(isinstance(scale, int | float) for scale in scales):
        raise InputError(f"scales is {scales}, expected numbers, for example [1,1.75,3].")
    models = find_models(config.checkpoints)
    dropout = {name: FeatInv.load(path).cond_drop_prob for name, path in models.items()}
    asked = [(name, scale) for name in models for scale in sorted(set(scales))]
    results: dict[tuple[str, float], dict] = {}
    for name, scale in tqdm(asked, unit="setting", desc="guidance"):
        changed = OmegaConf.merge(config, {"sampler": {"guidance_scale": scale}})
        metrics = score(name, models[name], changed, output / f"{name}_{scale:g}")
        if metrics is None:
            raise InputError(f"'{name}' is a prior, which has no condition: expected others.")
        results[name, scale] = metrics
    check_one_layer({name: results[name, scales[0]] for name in models})
    first = results[asked[0]]
    about = (
        f"{first['num_images']} images, {first['num_samples']} sample(s) each, seed {config.seed}; "
        f"on {first['device']} in {first['precision']}; mean over images with 95% bootstrap "
        f"interval. Backbone {first['backbone']}, layer {first['layer']}."
    )
    save_figure(figure(results, dropout), output / "cosine_against_guidance.png")
    publish(table_rows(results, dropout), about, config)


if __name__ == "__main__":
    run_entry_point(main, "guidance")
