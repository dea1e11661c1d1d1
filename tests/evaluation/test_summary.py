import numpy as np
import pandas as pd
import pytest

from featinv.evaluation.summary import summarize
from featinv.metrics import bootstrap_interval


def scores(number: int = 12) -> pd.DataFrame:
    """Cosines exactly three quarters of the way from floor to ceiling, which vary a lot."""
    random = np.random.default_rng(0)
    floor, ceiling = random.uniform(-0.2, 0.3, number), random.uniform(0.6, 1, number)
    return pd.DataFrame(
        {
            "ceiling/spatial_cosine": ceiling,
            "reconstruction/spatial_cosine": floor + 0.75 * (ceiling - floor),
            "reconstruction/psnr": random.normal(12, 2, number),
            "floor/spatial_cosine": floor,
        }
    )


def test_means_and_intervals_over_photographs():
    frame, photographs = scores(), pd.Series([f"p{i // 3}" for i in range(12)])
    summary = summarize(frame, photographs)
    for column in frame:
        row, metric = column.split("/")
        low, high = bootstrap_interval(frame[column], photographs=photographs)
        expected = {"mean": frame[column].mean(), "low": low, "high": high}
        assert summary[row][metric] == pytest.approx(expected)
        assert low < expected["mean"] < high


def test_ratios_are_of_means_resampled_together():
    summary = summarize(scores(), pd.Series(range(12)))
    expected = dict.fromkeys(("mean", "low", "high"), 0.75)
    assert summary["reconstruction"]["normalised_cosine"] == pytest.approx(expected)
    assert not any("normalised_cosine" in summary[row] for row in ("ceiling", "floor"))
    distances = scores()[["floor/spatial_cosine"]].set_axis(["reconstruction/to_original"], axis=1)
    distances["reconstruction/between_samples"] = 0.75 * distances["reconstruction/to_original"]
    ratio = summarize(distances, pd.Series(range(12)))["reconstruction"]["calibration_ratio"]
    assert ratio == pytest.approx(expected)
    no_floor = summarize(scores().drop(columns="floor/spatial_cosine"), pd.Series(range(12)))
    assert set(no_floor["reconstruction"]) == {"spatial_cosine", "psnr"}
