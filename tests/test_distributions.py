import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from featinv import InputError
from featinv.distributions import (
    Judge,
    frechet_distance,
    kernel_distance,
    precision_and_recall,
)


def normal(number: int, dims: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, dims, generator=generator)


def test_frechet_distance_is_the_formula():
    real, fake = normal(50, 6, 0), normal(70, 6, 1) * 1.5 + 0.3
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x.T)) for x in (real.numpy(), fake.numpy()))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-4)


def test_a_set_is_at_no_distance_from_itself():
    real = normal(50, 6, 0)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(real, real + 2) == pytest.approx(4 * 6, rel=1e-4)


def test_too_few_images_are_told():
    with pytest.raises(InputError, match="needs more than 6 images, got 6; expected .* 12"):
        frechet_distance(normal(50, 6, 0), normal(6, 6, 1))


def test_kernel_distance_is_the_formula():
    real, fake = normal(12, 5, 0), normal(12, 5, 1) + 0.5

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a.double() @ b.double()) / 5 + 1) ** 3

    def mean(a: torch.Tensor, b: torch.Tensor, same: bool) -> float:
        pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j)]
        return sum(kernel(x, y) for x, y in pairs) / len(pairs)

    expected = mean(real, real, True) + mean(fake, fake, True) - 2 * mean(real, fake, False)
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-4)
    assert abs(kernel_distance(normal(300, 5, 0), normal(300, 5, 1))) < 0.2 * abs(expected)


def test_precision_and_recall_count_points_on_the_other_manifold():
    line = torch.arange(8.0)[:, None]  # the second neighbour of an inner point is 1 away
    fake = torch.tensor([[0.5], [3.25], [6.5], [20.0], [30.0], [40.0]])
    precision, recall = precision_and_recall(line, fake, k=2)
    assert precision == 3 / 6
    # Balls around 0.5, 3.25 and 6.5 reach 6, 3.25 and 6; those of the others cover more.
    assert recall == 1
    assert precision_and_recall(line, line) == (1, 1)
    assert precision_and_recall(line, line + 100) == (0, 0)


@pytest.mark.parametrize("name", ["lite0", "lite1"])
def test_a_judge_looks_at_the_average_of_its_last_map(name):
    judge = Judge(name)
    images = torch.rand(2, 3, 96, 96) * 2 - 1
    seen = judge(images)
    assert seen.shape == (2, judge.num_features)
    assert torch.allclose(seen, judge.backbone.features(images).mean((2, 3)))


def test_an_unknown_judge():
    with pytest.raises(InputError, match="Unknown judge 'lite9': did you mean lite"):
        Judge("lite9")
