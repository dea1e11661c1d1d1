"""Means over images and their intervals, of a table with one row per image."""

import numpy as np
import pandas as pd

from featinv.metrics import bootstrap_means, normalised_cosine, percentile_interval

Summary = dict[str, dict[str, dict[str, float]]]  # row -> metric -> mean, low and high

COSINE = "spatial_cosine"


def summarize(scores: pd.DataFrame, photographs: pd.Series) -> Summary:
    """Return means with 95% bootstrap intervals, and the normalised cosine of each row.

    The interval of the normalised cosine is that of the ratio of means, whose floor and ceiling
    are resampled along.

    Args:
        scores: One row per image, columns `ROW/METRIC`.
        photographs: Which photograph each image shows; they are what is resampled.
    """
    summary: Summary = {}

    def add(row: str, metric: str, mean: float, resampled: np.ndarray) -> None:
        low, high = percentile_interval(resampled)
        cell = {"mean": float(mean), "low": float(low), "high": float(high)}
        summary.setdefault(row, {})[metric] = cell

    means = scores.mean()
    resampled = pd.DataFrame(bootstrap_means(scores, photographs), columns=scores.columns)
    for column in scores:
        add(*column.split("/"), means[column], resampled[column].to_numpy())
    floor, ceiling = f"floor/{COSINE}", f"ceiling/{COSINE}"
    if floor in scores:
        for row in [row for row in summary if row not in ("floor", "ceiling")]:
            columns = [f"{row}/{COSINE}", floor, ceiling]
            mean, spread = (
                normalised_cosine(*(frame[name] for name in columns))
                for frame in (means, resampled)
            )
            add(row, "normalised_cosine", mean, spread)
    return summary
