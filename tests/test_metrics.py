import warnings

import numpy as np
import pytest
import torch

from featinv.metrics import (
    bootstrap_interval,
    contrast,
    normalised_cosine,
    pixel_spread,
    pooled_cosine,
    relative_l2,
    saturated_share,
    spatial_cosine,
    top_k_agreement,
)
from featinv.utils.errors import InputError


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 5, 2, 4, generator=generator)
    return a, b


def test_spatial_cosine_is_a_loop_over_positions(maps):
    a, b = maps
    for i, value in enumerate(spatial_cosine(a, b)):
        positions = [
            cosine(a[i, :, y, x].numpy(), b[i, :, y, x].numpy()) for y in range(2) for x in range(4)
        ]
        assert value.item() == pytest.approx(np.mean(positions), abs=1e-6)


def test_pooled_cosine_averages_first_and_ignores_positions(maps):
    a, b = maps
    for i, value in enumerate(pooled_cosine(a, b)):
        expected = cosine(a[i].numpy().mean(axis=(1, 2)), b[i].numpy().mean(axis=(1, 2)))
        assert value.item() == pytest.approx(expected, abs=1e-6)
    moved = a.roll(1, dims=3)
    assert torch.allclose(pooled_cosine(a, moved), torch.ones(3))
    assert (spatial_cosine(a, moved) < 0.9).all()


def test_relative_l2_divides_by_the_reference(maps):
    a, b = maps
    expected = [np.linalg.norm((b - a)[i]) / np.linalg.norm(a[i]) for i in range(3)]
    assert relative_l2(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(relative_l2(a, 3 * a), torch.full((3,), 2.0))


def test_zero_features_do_not_give_nan(maps):
    a, _ = maps
    zero = torch.zeros_like(a)
    for metric in (spatial_cosine, pooled_cosine):
        assert torch.equal(metric(a, zero), torch.zeros(3))
        assert torch.equal(metric(zero, zero), torch.zeros(3))
    assert torch.equal(relative_l2(zero, zero), torch.zeros(3))
    assert torch.allclose(relative_l2(a, zero), torch.ones(3))


def test_half_precision_is_computed_in_float32(maps):
    a, b = (x.bfloat16() for x in maps)
    for metric in (spatial_cosine, pooled_cosine, relative_l2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = metric(a, b)
        assert torch.equal(value, metric(a.float(), b.float()))
        assert value.dtype == torch.float32


def test_top_k_agreement_is_the_ranking():
    a = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    b = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 3.0]])
    assert top_k_agreement(a, b, 1).tolist() == [0, 0]
    assert top_k_agreement(a, b, 2).tolist() == [1, 0]
    assert top_k_agreement(a, b, 5).tolist() == [1, 1]


def test_pixel_spread_is_the_unbiased_deviation_in_pixel_units():
    samples = torch.rand(2, 4, 3, 5, 6) * 2 - 1
    pixels = (samples.numpy() + 1) / 2
    expected = pixels.std(axis=1, ddof=1).mean(axis=1)
    assert np.allclose(pixel_spread(samples), expected, atol=1e-6)
    assert torch.equal(pixel_spread(samples[:, :1]), torch.zeros(2, 5, 6))


def test_bootstrap_interval_of_degenerate_values():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_interval([0.5]) == (0.5, 0.5)
        assert bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)
    with pytest.raises(InputError, match="at least one image"):
        bootstrap_interval([])


def test_bootstrap_interval_is_the_loop_over_resampled_photographs():
    rng = np.random.default_rng(1)
    photographs = [f"p{n}" for n in (1, 1, 2, 3, 3, 3, 4, 5, 5, 6)]
    values = rng.normal(3, 2, size=10)
    groups = [values[np.array(photographs) == name] for name in dict.fromkeys(photographs)]
    means = [
        np.concatenate([groups[i] for i in rng.integers(6, size=6)]).mean() for _ in range(8000)
    ]
    for data in (values, torch.from_numpy(values)):
        interval = bootstrap_interval(data, photographs)
        assert interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.12)


def test_more_crops_of_a_photograph_do_not_narrow_the_interval():
    values = np.random.default_rng(1).normal(size=20)
    crops = np.repeat(values, 8)
    own = [f"p{i // 8}" for i in range(160)]
    assert bootstrap_interval(crops, photographs=own) == pytest.approx(bootstrap_interval(values))
    narrow, wide = np.diff(bootstrap_interval(crops)), np.diff(bootstrap_interval(values))
    assert narrow < 0.5 * wide


def test_contrast_and_saturation_are_those_of_the_pixels():
    random = np.random.default_rng(0)
    values = random.integers(0, 256, (2, 3, 8, 8)) / 255  # 0..1
    values[0, 0] = 1
    values[0, 1, :4] = 0
    images = torch.from_numpy(values * 2 - 1).float()
    expected = [np.isin(image, (0, 1)).mean() for image in values]
    assert saturated_share(images).tolist() == pytest.approx(expected)
    assert expected[0] >= 0.5
    dull = 0.25 * images + 0.5
    assert contrast(images, dull).tolist() == pytest.approx([0.25, 0.25])
    flat = torch.zeros_like(images)
    deviation = values.std(axis=(1, 2, 3), ddof=1)
    assert contrast(flat, images).tolist() == pytest.approx((255 * deviation).tolist())


def test_the_normalised_cosine_is_0_for_the_floor_and_1_for_the_ceiling():
    assert normalised_cosine([0.2, 0.5, 0.8], 0.2, 0.8) == pytest.approx([0, 0.5, 1])
    assert np.isnan(normalised_cosine(0.5, 0.5, 0.5))
