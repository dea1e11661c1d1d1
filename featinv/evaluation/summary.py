"""Means over images and their intervals, of a table with one row per image."""

from collections.abc import Callable

import pandas as pd
from numpy.typing import ArrayLike

from featinv.metrics import (
    bootstrap_means,
    calibration_ratio,
    normalised_cosine,
    percentile_interval,
)

Summary = dict[str, dict[str, dict[str, float]]]  # row -> metric -> mean, low and high


def summarize(scores: pd.DataFrame, photographs: pd.Series) -> Summary:
    """Return means with 95% bootstrap intervals, and what is made of means.

    That is the normalised cosine of each row, and the calibration ratio of the reconstructions
    where there are several of an image. Their intervals are those of the ratio of means, all of
    which are resampled along.

    Args:
        scores: One row per image, columns `ROW/METRIC`.
        photographs: Which photograph each image shows; they are what is resampled.
    """
    summary: Summary = {}

    def add(row: str, metric: str, mean: float, resampled: ArrayLike) -> None:
        low, high = percentile_interval(resampled)
        cell = {"mean": float(mean), "low": float(low), "high": float(high)}
        summary.setdefault(row, {})[metric] = cell

    means = scores.mean()
    resampled = pd.DataFrame(bootstrap_means(scores, photographs), columns=scores.columns)
    for column in scores:
        add(*column.split("/"), means[column], resampled[column])

    def add_ratio(row: str, metric: str, ratio: Callable, *columns: str) -> None:
        if scores.columns.isin(columns).sum() == len(columns):
            values = (ratio(*(frame[name] for name in columns)) for frame in (means, resampled))
            add(row, metric, *values)

    for row in set(summary) - {"floor", "ceiling"}:
        cosines = [f"{name}/spatial_cosine" for name in (row, "floor", "ceiling")]
        add_ratio(row, "normalised_cosine", normalised_cosine, *cosines)
    distances = [f"reconstruction/{name}" for name in ("between_samples", "to_original")]
    add_ratio("reconstruction", "calibration_ratio", calibration_ratio, *distances)
    return summary
