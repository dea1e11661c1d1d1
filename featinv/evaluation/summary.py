"""Summarise a table with one row per image by means and their intervals."""

from collections.abc import Callable

import pandas as pd

from featinv.metrics import (
    bootstrap_means,
    calibration_ratio,
    normalised_cosine,
    percentile_interval,
)

Summary = dict[str, dict[str, dict[str, float]]]  # row -> metric -> mean, low and high


def summarize(scores: pd.DataFrame, photographs: pd.Series) -> Summary:
    """Return means with 95% bootstrap intervals, and the metrics that are ratios of means.

    The latter are the normalised cosine of each row, and the calibration ratio of several
    reconstructions per image. Their intervals come from the same resamples as those of the means.

    Args:
        scores: One row per image, columns `ROW/METRIC`.
        photographs: The photograph that each image shows, which is the unit of resampling.
    """
    summary: Summary = {}

    means = scores.mean()
    resampled = pd.DataFrame(bootstrap_means(scores, photographs), columns=scores.columns)

    def add(row: str, metric: str, function: Callable, *columns: str) -> None:
        if set(columns) <= set(scores):
            mean, values = (function(*(frame[c] for c in columns)) for frame in (means, resampled))
            low, high = percentile_interval(values)
            cell = {"mean": float(mean), "low": float(low), "high": float(high)}
            summary.setdefault(row, {})[metric] = cell

    for column in scores:
        add(*column.split("/"), lambda values: values, column)
    for row in set(summary) - {"floor", "ceiling"}:
        cosines = [f"{name}/spatial_cosine" for name in (row, "floor", "ceiling")]
        add(row, "normalised_cosine", normalised_cosine, *cosines)
    distances = [f"reconstruction/{name}" for name in ("between_samples", "to_original")]
    add("reconstruction", "calibration_ratio", calibration_ratio, *distances)
    return summary
