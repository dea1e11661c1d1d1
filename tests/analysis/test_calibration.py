import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from featinv import InputError
from featinv.analysis.calibration import Calibration, coverage, flatness, other_images

SAMPLES = 9


def gaussian_problem(
    seed: int, scale: float = 1.0, shift: float = 0.0, number: int = 200, size: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x ~ N(0, C) and y = A x + noise, and the exact posterior N(m(y), P) of x.

    Returns samples (number, SAMPLES, size), moved away from m(y) by a factor and all together by
    some standard deviations, the originals x (number, size), and independent points.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = randn(size, size) / size**0.5
    prior = root @ root.T + 0.05 * torch.eye(size)
    forward, noise = randn(size // 2, size) / size**0.5, 0.1
    observed = forward @ prior @ forward.T + noise * torch.eye(size // 2)
    gain = prior @ forward.T @ torch.linalg.inv(observed)
    posterior = prior - gain @ forward @ prior
    root, posterior_root = map(torch.linalg.cholesky, (prior, (posterior + posterior.T) / 2))
    x, references = (randn(number, size) @ root.T for _ in range(2))
    y = x @ forward.T + noise**0.5 * randn(number, size // 2)
    deviation = scale * randn(number, SAMPLES, size) + shift
    return (y @ gain.T)[:, None] + deviation @ posterior_root.T, x, references


def calibrate(*problem: Tensor) -> Calibration:
    calibration = Calibration(SAMPLES)
    calibration.update(*problem)
    return calibration


SEEDS = range(12)  # that no result is luck


def test_exact_posterior_samples_are_calibrated():
    found = [calibrate(*gaussian_problem(seed)) for seed in SEEDS]
    ratios, lows, highs = zip(*(each.ratio() for each in found), strict=True)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.01)
    assert sum(low <= 1 <= high for low, high in zip(lows, highs, strict=True)) >= 9
    for name in ("ranks", "reference_ranks"):
        # p-values are uniform if all is well; the sum of -2 log p is then chi-square distributed.
        statistic = sum(-2 * math.log(each.p_value(name)) for each in found)
        assert statistic < 42.98  # its 99 % quantile for 24 degrees of freedom
        pooled = torch.cat([each[name] for each in found])
        assert flatness(pooled, SAMPLES + 1) > 0.01


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_samples_shrunk_or_inflated_by_20_percent_are_detected(scale):
    expected = scale / ((1 + scale**2) / 2) ** 0.5
    for seed in SEEDS:
        calibration = calibrate(*gaussian_problem(seed, scale))
        ratio, low, high = calibration.ratio()
        assert ratio == pytest.approx(expected, abs=0.04)
        assert high < 1 if scale < 1 else low > 1
        assert calibration.p_value() < 1e-3
        middle = calibration["ranks"].float().mean() - SAMPLES / 2
        assert middle > 1 if scale < 1 else middle < -1


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_coverage_shows_samples_that_are_too_narrow_or_too_wide(scale):
    parts = [calibrate(*gaussian_problem(s, scale))["reference_ranks"] for s in SEEDS]
    found = coverage(torch.cat(parts), SAMPLES + 1)
    assert found["level"][[0, 5, 10]].tolist() == [0, 0.5, 1]
    off = (found["coverage"] - found["level"])[6:10]
    assert (off < -0.03).all() if scale < 1 else (off > 0.03).all()
    assert ((found["low"] <= found["coverage"]) & (found["coverage"] <= found["high"])).all()
    single = [coverage(part, SAMPLES + 1) for part in parts]
    outside = [
        bool(((s["low"] > s["level"] + 1e-9) | (s["high"] < s["level"] - 1e-9)).any())
        for s in single
    ]
    assert sum(outside) >= 9  # with 200 images


def test_a_wrong_mean_lowers_the_ratio():
    ratio, _, high = calibrate(*gaussian_problem(0, shift=0.5)).ratio()
    # |x_j - x_0|^2 grows from 2 to 2 + 0.25 for each dimension.
    assert ratio == pytest.approx((2 / 2.25) ** 0.5, abs=0.03) and high < 1


def test_numbers_are_those_of_a_naive_loop():
    samples, originals, references = gaussian_problem(0, number=5)
    found = calibrate(samples, originals, references)
    for i in range(5):
        points = [*samples[i], originals[i]]
        to = [[float((a - b).square().mean().sqrt()) for b in points] for a in points]
        pairs = [to[j][k] for j, k in combinations(range(SAMPLES), 2)]
        assert found["between"][i] == pytest.approx(sum(pairs) / len(pairs))
        assert found["to_original"][i] == pytest.approx(sum(to[-1]) / SAMPLES)
        assert found["ranks"][i] == sum(sum(row) < sum(to[-1]) for row in to[:-1])
        reach = [float((point - references[i]).square().mean().sqrt()) for point in points]
        assert found["reference_ranks"][i] == sum(r < reach[-1] for r in reach[:-1])
    ratio = sum(found["between"]) / sum(found["to_original"])
    assert found.ratio()[0] == pytest.approx(float(ratio))
    assert found.histogram().sum() == 5


def test_numbers_depend_neither_on_batches_nor_on_saving():
    problem = gaussian_problem(0, number=20)
    whole, parts = calibrate(*problem), Calibration(SAMPLES)
    for part in zip(*(values.split(3) for values in problem), strict=True):
        parts.update(*part)
    again = Calibration.of(SAMPLES, whole.numbers())
    assert whole.ratio() == pytest.approx(parts.ratio()) and whole.ratio() == again.ratio()
    for name in ("ranks", "reference_ranks"):
        assert torch.equal(whole[name], parts[name]) and torch.equal(whole[name], again[name])


def test_identical_samples_are_maximally_overconfident():
    samples, originals, _ = gaussian_problem(0, number=50)
    calibration = calibrate(samples[:, :1].expand_as(samples), originals)
    assert calibration.ratio()[0] == 0 and (calibration["ranks"] == SAMPLES).all()
    # Where even the original is the same, its rank is drawn.
    calibration = calibrate(originals[:, None].expand_as(samples), originals)
    assert len(calibration["ranks"].unique()) == SAMPLES + 1


def test_flatness_is_pearsons_test():
    ranks = torch.tensor([0] * 30 + [1] * 10 + [2] * 20)
    # chi^2 = (10^2 + 10^2 + 0) / 20 = 10 with 2 degrees of freedom: p = exp(-10 / 2)
    assert flatness(ranks, 3) == pytest.approx(math.exp(-5))
    assert flatness(torch.tensor([0, 1, 2, 3, 4] * 2), 5) == pytest.approx(1, abs=0.5)
    assert math.isnan(flatness(torch.tensor([0] * 9), 5))


def test_another_image_is_of_another_class():
    assert other_images([3, 3, 3, 5]) == [3, 3, 3, 0]
    assert other_images([3, 3]) == [1, 0]
    assert other_images([-1, -1, -1]) == [1, 2, 0]
    with pytest.raises(InputError, match="There is no other image"):
        other_images([3])


def test_bad_input():
    with pytest.raises(InputError, match="num_samples is 1"):
        Calibration(1)
    with pytest.raises(InputError, match="There are 9 samples of each image, expected 4"):
        Calibration(4).update(*gaussian_problem(0, number=2))
    with pytest.raises(InputError, match="There are no reference ranks: expected"):
        Calibration(4).coverage()
