import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from featinv import InputError
from featinv.analysis.calibration import calibrate, coverage, flatness, ratio_interval

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


def numbers(samples: Tensor, originals: Tensor, references: Tensor) -> dict[str, Tensor]:
    return calibrate(samples, originals, references, range(len(samples)))


def ratio(found: dict[str, Tensor], photographs: Tensor | None = None) -> tuple[float, ...]:
    return ratio_interval(found["between"], found["to_original"], photographs)


SEEDS = range(12)  # that no result is luck


def test_exact_posterior_samples_are_calibrated():
    found = [numbers(*gaussian_problem(seed)) for seed in SEEDS]
    ratios, lows, highs = zip(*map(ratio, found), strict=True)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.01)
    assert sum(low <= 1 <= high for low, high in zip(lows, highs, strict=True)) >= 9
    for name in ("ranks", "reference_ranks"):
        # p-values are uniform if all is well; the sum of -2 log p is then chi-square distributed.
        statistic = sum(-2 * math.log(flatness(each[name], SAMPLES + 1)) for each in found)
        assert statistic < 42.98  # its 99 % quantile for 24 degrees of freedom
        pooled = torch.cat([each[name] for each in found])
        assert flatness(pooled, SAMPLES + 1) > 0.01


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_samples_shrunk_or_inflated_by_20_percent_are_detected(scale):
    expected = scale / ((1 + scale**2) / 2) ** 0.5
    for seed in SEEDS:
        found = numbers(*gaussian_problem(seed, scale))
        value, low, high = ratio(found)
        assert value == pytest.approx(expected, abs=0.04)
        assert high < 1 if scale < 1 else low > 1
        assert flatness(found["ranks"], SAMPLES + 1) < 1e-3
        middle = found["ranks"].float().mean() - SAMPLES / 2
        assert middle > 1 if scale < 1 else middle < -1


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_coverage_shows_samples_that_are_too_narrow_or_too_wide(scale):
    parts = [numbers(*gaussian_problem(s, scale))["reference_ranks"] for s in SEEDS]
    level, covered, low, high = coverage(torch.cat(parts), SAMPLES + 1)
    assert level[[0, 5, 10]].tolist() == [0, 0.5, 1]
    off = (covered - level)[6:10]
    assert (off < -0.03).all() if scale < 1 else (off > 0.03).all()
    assert ((low <= covered) & (covered <= high)).all()
    single = [coverage(part, SAMPLES + 1) for part in parts]
    outside = [((low > level + 1e-9) | (high < level - 1e-9)).any() for _, _, low, high in single]
    assert sum(outside) >= 9  # with 200 images


def test_intervals_are_over_photographs():
    found = numbers(*gaussian_problem(0))
    crops = {name: values.repeat(2) for name, values in found.items()}
    photographs = torch.arange(200).repeat(2)
    ranks = crops["reference_ranks"]
    assert ratio(crops, photographs) == pytest.approx(ratio(found))
    alone, crops = (coverage(ranks, SAMPLES + 1, by) for by in (None, photographs))
    expected = coverage(found["reference_ranks"], SAMPLES + 1)
    for values, wanted in zip(crops, expected, strict=True):
        assert values == pytest.approx(wanted)
    assert (crops[3] - crops[2])[5] > 1.2 * (alone[3] - alone[2])[5]


def test_a_wrong_mean_lowers_the_ratio():
    value, _, high = ratio(numbers(*gaussian_problem(0, shift=0.5)))
    # |x_j - x_0|^2 grows from 2 to 2 + 0.25 for each dimension.
    assert value == pytest.approx((2 / 2.25) ** 0.5, abs=0.03) and high < 1


def test_numbers_are_those_of_a_naive_loop():
    samples, originals, references = gaussian_problem(0, number=5)
    found = numbers(samples, originals, references)
    for i in range(5):
        points = [*samples[i], originals[i]]
        to = [[float((a - b).square().mean().sqrt()) for b in points] for a in points]
        pairs = [to[j][k] for j, k in combinations(range(SAMPLES), 2)]
        assert found["between"][i] == pytest.approx(sum(pairs) / len(pairs))
        assert found["to_original"][i] == pytest.approx(sum(to[-1]) / SAMPLES)
        assert found["ranks"][i] == sum(sum(row) < sum(to[-1]) for row in to[:-1])
        reach = [float((point - references[i]).square().mean().sqrt()) for point in points]
        assert found["reference_ranks"][i] == sum(r < reach[-1] for r in reach[:-1])
    expected = sum(found["between"]) / sum(found["to_original"])
    assert ratio(found)[0] == pytest.approx(float(expected))


def test_identical_samples_are_maximally_overconfident():
    samples, originals, references = gaussian_problem(0, number=50)
    found = numbers(samples[:, :1].expand_as(samples), originals, references)
    assert ratio(found)[0] == 0 and (found["ranks"] == SAMPLES).all()


def test_ties_are_broken_at_random_but_not_by_the_batch():
    samples, originals, references = gaussian_problem(0, number=50)
    samples = originals[:, None].expand_as(samples)
    whole = numbers(samples, originals, references)
    part = calibrate(samples[7:9], originals[7:9], references[7:9], [7, 8])
    for name in ("ranks", "reference_ranks"):
        assert len(whole[name].unique()) == SAMPLES + 1
        assert torch.equal(part[name], whole[name][7:9])


def test_flatness_is_pearsons_test():
    ranks = torch.tensor([0] * 30 + [1] * 10 + [2] * 20)
    # chi^2 = (10^2 + 10^2 + 0) / 20 = 10 with 2 degrees of freedom: p = exp(-10 / 2)
    assert flatness(ranks, 3) == pytest.approx(math.exp(-5))
    assert flatness(torch.tensor([0, 1, 2, 3, 4] * 2), 5) == pytest.approx(1, abs=0.5)
    assert math.isnan(flatness(torch.tensor([0] * 9), 5))


def test_one_sample_has_no_spread():
    with pytest.raises(InputError, match="num_samples is 1"):
        numbers(torch.zeros(2, 1, 3), torch.zeros(2, 3), torch.zeros(2, 3))
