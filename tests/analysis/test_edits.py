import re

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from featinv import InputError
from featinv.analysis.edits import (
    half,
    mix,
    splice,
    steer,
    strongest_channels,
    strongest_unit,
)


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Steering


def test_steering_changes_one_concept_and_nothing_else():
    direction = normalize(maps(6), dim=0)
    presence = maps(2, 3, 3, seed=1)
    rest = maps(2, 6, 3, 3, seed=2)
    rest = rest - torch.einsum("bchw,c->bhw", rest, direction)[:, None] * direction[:, None, None]
    features = rest + presence[:, None] * direction[:, None, None]
    for factor in (0, 0.5, 1, 2):
        steered = steer(features, presence, direction, factor)
        now = torch.einsum("bchw,c->bhw", steered, direction)
        torch.testing.assert_close(now, factor * presence)
        expected = rest + factor * presence[:, None] * direction[:, None, None]
        torch.testing.assert_close(steered, expected)


def test_steering_within_a_mask():
    features, presence, direction = maps(2, 6, 3, 3), maps(2, 3, 3, seed=1), maps(6, seed=2)
    mask = half((3, 3), "left")
    steered = steer(features, presence, direction, 0, mask)
    everywhere = steer(features, presence, direction, 0)
    assert torch.equal(steered[..., 0], everywhere[..., 0])
    assert torch.equal(steered[..., 1:], features[..., 1:])
    partly = steer(features, presence, direction, 0, torch.full((2, 3, 3), 0.25))
    torch.testing.assert_close(partly, torch.lerp(features, everywhere, 0.25))


# Mixtures


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_a_mixture_begins_and_ends_at_its_parts(path):
    a, b = maps(2, 6, 3, 3), maps(2, 6, 3, 3, seed=1)
    torch.testing.assert_close(mix(a, b, 0, path), a)
    torch.testing.assert_close(mix(a, b, 1, path), b)
    torch.testing.assert_close(mix(a, b, 0.3, path), mix(b, a, 0.7, path))


def test_a_spherical_mixture_keeps_length_and_turns_evenly():
    a, b = maps(1, 6, 2, 2), maps(1, 6, 2, 2, seed=1)
    a, b = 3 * normalize(a, dim=1), 5 * normalize(b, dim=1)
    whole = cosine_similarity(a, b).acos()
    for weight in (0.25, 0.5, 0.75):
        mixed = mix(a, b, weight, "spherical")
        torch.testing.assert_close(mixed.norm(dim=1), torch.full((1, 2, 2), 3 + 2 * weight))
        turned = cosine_similarity(a, mixed).acos()
        torch.testing.assert_close(turned, weight * whole, rtol=1e-3, atol=1e-3)


def test_a_spherical_mixture_without_an_angle_is_linear():
    a = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    for b in (2 * a, -a, torch.zeros_like(a)):
        assert torch.equal(mix(a, b, 0.25, "spherical"), torch.lerp(a, b, 0.25))


def test_a_splice_takes_each_side_from_one():
    a, b = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    for side, rows, columns in (
        ("left", slice(None), slice(0, 2)),
        ("right", slice(None), slice(3, 5)),
        ("top", slice(0, 2), slice(None)),
        ("bottom", slice(2, 4), slice(None)),
    ):
        mask = half((4, 5), side)
        spliced = splice(a, b, mask)
        expected = a.clone()
        expected[..., rows, columns] = b[..., rows, columns]
        assert torch.equal(spliced, expected)


def test_a_splice_takes_channels_from_one():
    a, b = maps(2, 4, 3, 3), maps(2, 4, 3, 3, seed=1)
    expected = torch.stack([a[:, 0], b[:, 1], a[:, 2], b[:, 3]], dim=1)
    mask = torch.tensor([False, True, False, True])[:, None, None]
    assert torch.equal(splice(a, b, mask), expected)


# Single features


def test_the_strongest_are_those_of_each_image():
    features = torch.zeros(2, 4, 2, 3)
    features[0, 2], features[0, 1, 1, 2] = 2.0, -5.0
    features[1, 3], features[1, 0, 0, 1] = -1.0, 4.0
    assert strongest_unit(features).nonzero().tolist() == [[0, 1, 1, 2], [1, 0, 0, 1]]
    mask = strongest_channels(features, 1)
    assert mask[0, 2].all() and mask[1, 3].all() and int(mask.sum()) == 2 * 6


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda a: mix(a, a[:, :2], 0.5), "(2, 4, 3, 3) and (2, 2, 3, 3), expected the same"),
        (lambda a: mix(a, a, 0.5, "sperical"), "'sperical': did you mean spherical?"),
        (lambda a: half((3, 3), "lft"), "Unknown side 'lft': did you mean left"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        call(maps(2, 4, 3, 3))
