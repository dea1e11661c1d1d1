import pytest
import torch

from featinv.analysis.effects import locality, map_cosine, obtained_share


def test_locality_is_the_ratio_of_two_means():
    change = torch.ones(2, 9, 9)
    change[0, 3:6, 6:] = 5.0
    where = torch.zeros(2, 3, 3, dtype=torch.bool)
    where[:, 1, 2] = True
    assert locality(change, where).tolist() == pytest.approx([5, 1])


def test_the_obtained_share_is_a_projection():
    wanted = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    across = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    across -= obtained_share(across, wanted)[:, None, None, None] * wanted
    shares = torch.tensor([0.0, 0.5, 2.0])
    found = obtained_share(across + shares[:, None, None, None] * wanted, wanted)
    torch.testing.assert_close(found, shares, rtol=1e-4, atol=1e-5)


def test_the_cosine_of_maps_ignores_zero_positions():
    a = torch.tensor([[3.0, 0], [4, 0]]).view(1, 2, 2, 1)
    assert map_cosine(a, 2 * a).tolist() == pytest.approx([1])
    assert map_cosine(a, a + torch.tensor([[0.0, 5], [0, 0]]).view(1, 2, 2, 1)).tolist() == (
        pytest.approx([0.5**0.5])
    )
