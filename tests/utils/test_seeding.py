import torch

from featinv.utils.seeding import make_generator, randn


def test_the_same_numbers_give_the_same_stream_whatever_was_drawn_before():
    first = torch.randn(5, generator=make_generator(3, 1, 4))
    torch.rand(7)
    assert torch.equal(first, torch.randn(5, generator=make_generator(3, 1, 4)))


def test_every_tuple_of_numbers_has_a_stream_of_its_own():
    names = [(a, b, c) for a in range(1, 9) for b in range(1, 9) for c in range(1, 9)]
    assert len({make_generator(*name).initial_seed() for name in names}) == len(names)


def test_a_row_of_randn_depends_on_its_own_generator_alone():
    shape = (2, 3, 4)
    noise = randn(shape, [make_generator(0, i) for i in (5, 1, 7)])
    assert noise.shape == (3, *shape) and noise.dtype == torch.float32
    assert torch.equal(noise[1], torch.randn(shape, generator=make_generator(0, 1)))
    assert torch.equal(noise[2:], randn(shape, [make_generator(0, 7)]))
    assert not torch.equal(noise[0], noise[1])
