import pytest
import torch

from featinv.utils.seeding import make_generator, randn


def test_the_same_numbers_give_the_same_stream_whatever_was_drawn_before():
    first = torch.randn(5, generator=make_generator(3, 1, 4))
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(first, torch.randn(5, generator=make_generator(3, 1, 4)))


def test_making_a_generator_leaves_the_global_one_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    torch.rand(1, generator=make_generator(5))
    assert torch.equal(torch.rand(3), expected)


def test_other_numbers_in_other_order_give_other_streams():
    names = [(a, b, c) for a in range(1, 9) for b in range(1, 9) for c in range(1, 9)]
    assert len({make_generator(*name).initial_seed() for name in names}) == len(names)


def test_neighbouring_streams_are_not_correlated():
    draws = torch.stack([torch.randn(2000, generator=make_generator(0, i)) for i in range(20)])
    correlation = torch.corrcoef(draws) - torch.eye(20)
    assert correlation.abs().max() < 5 / 2000**0.5


def test_any_number_that_an_index_can_be_is_taken():
    assert make_generator(2**63, 0).initial_seed() >= 0
    with pytest.raises(ValueError, match="non-negative"):
        make_generator(-1)


def test_a_row_of_randn_depends_on_its_own_generator_only():
    shape = (2, 3, 4)
    noise = randn(shape, [make_generator(0, i) for i in (5, 1, 7)])
    assert noise.shape == (3, *shape) and noise.dtype == torch.float32
    assert torch.equal(noise[1], torch.randn(shape, generator=make_generator(0, 1)))
    assert torch.equal(noise[2:], randn(shape, [make_generator(0, 7)]))
    assert not torch.equal(noise[0], noise[1])


def test_randn_is_standard_normal():
    noise = randn((100, 100), [make_generator(0, i) for i in range(10)]).double()
    assert noise.mean().abs() < 0.02
    assert noise.var().item() == pytest.approx(1, abs=0.02)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=0.1)
