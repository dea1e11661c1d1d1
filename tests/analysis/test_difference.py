import pytest
import torch
from torch import Tensor

from featinv import InputError
from featinv.analysis.difference import (
    difference_map,
    draw_pairs,
    share_inside,
)
from featinv.analysis.planted import load_planted
from featinv.models.featinv import FeatInv

GUIDED = {
    "num_steps": 8,
    "epsilon_scaling": 0.03,
    "feature_guidance_scale": 10,
    "polish_steps": 8,
    "polish_step_size": 0.1,
}


@pytest.fixture(scope="module")
def prior() -> FeatInv:
    return FeatInv.load("imagenette-small-prior")


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic").clamp(-1, 1)


@pytest.fixture(scope="module")
def quadrant() -> Tensor:
    region = torch.zeros(128, 128, dtype=torch.bool)
    region[64:, 64:] = True
    return region


def test_copies_of_a_model_show_no_difference(prior, pictures):
    a, b = load_planted("low_pass"), load_planted("low_pass")
    kept, moved = draw_pairs(prior, pictures, a, b, 0.9, num_samples=2, **GUIDED)
    assert kept.std() > 0.1
    assert difference_map(kept, moved).max() < 1e-3


def test_the_difference_lies_where_only_one_model_sees(prior, pictures, quadrant):
    blind, seeing = load_planted("blind"), load_planted("low_pass")
    kept, moved = draw_pairs(prior, pictures, blind, seeing, 0.5, num_samples=2, **GUIDED)
    assert (share_inside(difference_map(kept, moved), quadrant) > 0.7).all()  # chance: 0.25

    def off(images: Tensor, part: Tensor) -> float:
        """How far what `low_pass` keeps is from the original, in a part of the picture."""
        error = seeing.kept(images[:, 0]) - seeing.kept(pictures)
        return float(error[:, :, part].square().mean())

    assert off(moved, quadrant) > 1.5 * off(kept, quadrant)
    assert off(moved, ~quadrant) < 1.2 * off(kept, ~quadrant)
    # Nothing that A sees is hidden from B: to keep A is to keep what B sees of it.
    less = draw_pairs(prior, pictures, seeing, blind, 0.5, num_samples=2, **GUIDED)
    assert difference_map(*less).mean() < 0.5 * difference_map(kept, moved).mean()


def test_pairs_depend_on_seed_and_number_only(awake_model, images):
    a, b = (load_planted(name, 32) for name in ("blind", "low_pass"))
    options = {"num_samples": 2, "seed": 1, "num_steps": 2, "feature_guidance_scale": 1}
    whole = draw_pairs(awake_model.eval(), images, a, b, **options)
    single = draw_pairs(awake_model, images[1:2], a, b, indices=[1], **options)
    for drawn, alone in zip(whole, single, strict=True):
        torch.testing.assert_close(drawn[1:2], alone, rtol=0, atol=0.02)


def test_a_difference_is_consistent_over_samples(quadrant):
    kept = torch.zeros(2, 3, 3, 128, 128)
    moved = kept.clone()
    moved[0, :, :, 64:, 64:], moved[0, 1, 2, :8, :8] = 1, -2  # that of one sample is its noise
    difference = difference_map(kept, moved)
    assert difference[0, 100, 100] == 0.25 and difference[0, 0, 0] == 0
    moved[0, :, 2, :8, :8] = -2
    inside, outside = 64 * 64 / 4, 8 * 8 / 3
    found = share_inside(difference_map(kept, moved), quadrant)
    assert found.tolist() == pytest.approx([inside / (inside + outside), 0])
    noise = torch.randn(1, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert difference_map(noise, 0 * noise).mean().abs() < 0.02 * noise.square().mean() / 4


def test_bad_input(awake_model, images):
    a = load_planted("blind", 32)
    with pytest.raises(InputError, match="feature_guidance_scale is 0"):
        draw_pairs(awake_model, images, a, a)
    for values in ({"weight": 0}, {"weight": 1}):
        with pytest.raises(InputError, match="expected between 0 and 1, for example 0.5"):
            draw_pairs(awake_model, images, a, a, **values)
