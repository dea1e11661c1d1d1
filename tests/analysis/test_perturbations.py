import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from featinv import InputError
from featinv.analysis.perturbations import (
    attacks,
    corrupt,
    corruptions,
    fgsm,
    pgd,
)
from featinv.backbones import Backbone
from featinv.utils.pixels import eight_bit, from_uint8, to_uint8

SEEDED = ["gaussian_noise", "shot_noise", "defocus_blur", "motion_blur", "zoom_blur", "snow"]
SEEDED += [
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    backbone = Backbone("resnet10t", weights="random", image_size=64, num_classes=5)
    head = backbone.model.fc.weight  # of random features all classes are nearly the same
    head.data = torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    return backbone


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1
    images = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic")
    return eight_bit(0.9 * images.clamp(-1, 1))


# Corruptions


@pytest.mark.parametrize("name", SEEDED)
def test_a_corruption_depends_on_seed_and_number_only(name, pictures):
    pytest.importorskip("imagecorruptions")
    images = to_uint8(pictures)
    whole = corrupt(images, [0, 1, 2, 3], name, 3, seed=1)
    assert whole.shape == images.shape and whole.dtype == torch.uint8
    assert not torch.equal(whole, images)
    np.random.seed(7)  # what was drawn before
    assert torch.equal(corrupt(images[2:], [2, 3], name, 3, seed=1), whole[2:])


def test_corruptions_are_all_of_the_package_and_grow(pictures):
    package = pytest.importorskip("imagecorruptions")
    assert list(corruptions(None, [2], 0)) == [f"{n} 2" for n in package.get_corruption_names()]
    images = to_uint8(pictures)
    change = [
        (corrupt(images, range(4), "contrast", severity, 0).float() - images.float()).abs().mean()
        for severity in (1, 3, 5)
    ]
    assert change[0] < change[1] < change[2]


# Adversarial examples


def margin(backbone: Backbone, images: Tensor, labels: Tensor) -> Tensor:
    """Return how far the logit of a label is above the best other one."""
    logits = backbone.classify(images)
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], float("-inf")).amax(1)


@pytest.mark.parametrize("eps", [1, 4])
def test_fgsm_is_one_step_up_the_loss(eps, backbone, pictures):
    changed = fgsm(backbone, pictures, eps)
    labels = backbone.classify(pictures).argmax(1)
    images = pictures.clone().requires_grad_()
    loss = -backbone.classify(images).log_softmax(1).gather(1, labels[:, None]).sum()
    loss.backward()
    naive = (to_uint8(pictures).int() + eps * images.grad.sign()).clamp(0, 255)
    assert torch.equal(to_uint8(changed).int(), naive.int())
    assert (margin(backbone, changed, labels) < margin(backbone, pictures, labels)).all()


def attack(backbone: Backbone, pictures: Tensor, rows: list[int], seed: int = 0) -> Tensor:
    return to_uint8(pgd(backbone, pictures[rows], 4, seed, rows, num_steps=10)).int()


def test_pgd_stays_within_eps_and_misleads_more(backbone, pictures):
    labels = backbone.classify(pictures).argmax(1)
    many = attack(backbone, pictures, [0, 1, 2, 3])
    assert (many - to_uint8(pictures).int()).abs().max() == 4
    one = fgsm(backbone, pictures, 4)
    many = from_uint8(many.byte())
    assert margin(backbone, many, labels).mean() < margin(backbone, one, labels).mean()


def test_pgd_starts_from_noise(backbone, pictures, monkeypatch):
    """Gradients of zero leave it: uniform within eps, by the image's own generator."""
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, images: (torch.zeros_like(images),))
    started = pgd(backbone, pictures, 8, seed=0, indices=range(4), num_steps=1)
    change = (to_uint8(started).int() - to_uint8(pictures).int()).float()
    assert change.abs().max() == 8 and change.mean().abs() < 0.2
    assert change.std() == pytest.approx(8 / 3**0.5, rel=0.05)


def test_pgd_depends_on_seed_and_number_only(backbone, pictures):
    whole = attack(backbone, pictures, [0, 1, 2, 3])
    different = (attack(backbone, pictures, [2]) != whole[2:3]).float().mean()
    assert different < 0.02  # a sign near zero may turn with the batch size
    assert (attack(backbone, pictures, [2], seed=1) != whole[2:3]).float().mean() > 0.1
    assert all(p.grad is None for p in backbone.parameters())


def test_a_grid_of_attacks_holds_each_attack(backbone, pictures):
    images = to_uint8(pictures)
    made = attacks(backbone, ["fgsm", "pgd"], [2, 4], seed=0, num_steps=3)
    assert list(made) == ["fgsm 2/255", "fgsm 4/255", "pgd 2/255", "pgd 4/255"]
    assert torch.equal(made["fgsm 4/255"](images, range(4)), to_uint8(fgsm(backbone, pictures, 4)))
    expected = to_uint8(pgd(backbone, pictures, 2, seed=0, indices=range(4), num_steps=3))
    assert torch.equal(made["pgd 2/255"](images, range(4)), expected)


def test_a_missing_package_is_reported_before_the_first_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(InputError, match="pip install imagecorruptions-imaug"):
        corruptions(["fog"], [1], 0)
    assert corruptions([], [1], 0) == {}


def test_bad_input(backbone, pictures):
    with pytest.raises(InputError, match="Unknown attack 'pdg': did you mean pgd"):
        attacks(backbone, ["pdg"], [1], 0, 2)
    for name, severity, sentence in (
        ("fogg", 1, "Unknown corruption 'fogg': did you mean fog"),
        ("fog", 6, "The severity is 6, expected 1 to 5."),
    ):
        with pytest.raises(InputError, match=sentence):
            corruptions([name], [severity], 0)
    for values in ({"eps": 0}, {"eps": 300}, {"eps": 1, "num_steps": 0}):
        with pytest.raises(InputError, match=f"eps is {values['eps']} and num_steps"):
            pgd(backbone, pictures, seed=0, indices=range(4), **values)
