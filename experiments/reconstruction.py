"""Table 1: how well each model reconstructs, with upper and lower bounds for each backbone.

python experiments/reconstruction.py checkpoints=[outputs/small] data=imagenette data.root=PATH

Each model is scored as by evaluate.py, in a folder of its own below `output`; the same command
continues with those that are missing. Priors are left out, unless `methods` guides them:
'{training-free: {checkpoint: PRIOR, sampler: {feature_guidance_scale: 10}}}'.
"""

from omegaconf import DictConfig

import harness
from featinv.cli.app import run_entry_point
from featinv.evaluation.report import headline
from featinv.evaluation.set_metrics import distance_name
from featinv.evaluation.tables import format_interval
from featinv.utils.errors import InputError
from settings import find_settings

# Columns beyond the headline: metric of metrics.json -> title.
COLUMNS = {
    "pooled_cosine": "pooled cosine",
    "relative_l2": "relative L2",
    "top5_agreement": "top-5",
}


def cells(metrics: dict, row: str) -> dict[str, str]:
    """Return the table's cells for a row of metrics.json."""
    scores, shown = metrics["rows"].get(row, {}), headline(metrics, row)
    more = {COLUMNS[name]: format_interval(**scores[name]) for name in COLUMNS if name in scores}
    for extractor, sets in metrics["sets"].items():
        if distance_name("kid", extractor) in shown:
            found = sets.get(row, {})
            more |= {
                distance_name(name, extractor): f"{found[name]:.3g}"
                for name in ("precision", "recall")
                if name in found
            }
    return shown | more


def table_rows(results: dict[str, dict]) -> list[dict[str, str]]:
    """Return the table as text: the models, then ceiling, codec and floor of each backbone."""
    rows = []
    references: dict[tuple[str, str], dict] = {}
    for name, metrics in results.items():
        row = {"backbone": metrics["backbone"], "model": f"{name} ({metrics['conditioning']})"}
        best = format_interval(**metrics["rows"]["best"]["spatial_cosine"])
        seconds = f"{metrics['seconds_per_reconstruction']:.2f}"
        row |= cells(metrics, "reconstruction")
        rows.append(row | {"best of S": best, "s per image": seconds})
        references.setdefault((metrics["backbone"], metrics["layer"]), metrics)
    for (backbone, _), metrics in references.items():
        for row in ("ceiling", "codec", "floor"):
            if row in metrics["rows"]:
                rows.append({"backbone": backbone, "model": row} | cells(metrics, row))
    return rows


def main(config: DictConfig) -> None:
    """Score every model, write the table."""
    results = harness.score_all(find_settings(config), config, skip_priors=True)
    if not results:
        raise InputError(f"There is nothing to score in {config.checkpoints}: only priors.")
    about = harness.scored_caption(next(iter(results.values())))
    harness.publish(table_rows(results), about, config)


if __name__ == "__main__":
    run_entry_point(main, "reconstruction")
