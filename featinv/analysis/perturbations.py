"""Altered images: corruptions as in ImageNet-C, and adversarial examples."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.backbones import Backbone
from featinv.utils.errors import InputError, unknown
from featinv.utils.pixels import eight_bit, from_uint8, to_uint8
from featinv.utils.seeding import Draw, make_generator

# uint8 images (B, 3, H, W) and their indices (B,) -> altered images, uint8 on the CPU
Alteration = Callable[[Tensor, Sequence[int]], Tensor]


def corruptions(
    names: Sequence[str] | None, severities: Sequence[int], seed: int
) -> dict[str, Alteration]:
    """Return `NAME SEVERITY` -> corruption, for all pairs of names and severities.

    Args:
        names: Some of ImageNet-C's corruptions; `None`: all fifteen.
        severities: 1 to 5 each.
        seed: Seed of the noise.

    Raises:
        InputError: Unknown name or severity, or the package imagecorruptions-imaug is missing.
    """
    if names is not None and not names:
        return {}
    try:
        known = import_module("imagecorruptions").get_corruption_names()
    except ImportError as error:
        raise InputError(
            "Corruptions need another package: pip install imagecorruptions-imaug"
        ) from error
    names = known if names is None else names
    for name, severity in product(names, severities):
        if name not in known:
            raise unknown("corruption", name, known)
        if severity not in range(1, 6):
            raise InputError(f"The severity is {severity}, expected 1 to 5.")
    return {
        f"{name} {severity}": partial(corrupt, name=name, severity=severity, seed=seed)
        for name, severity in product(names, severities)
    }


def corrupt(images: Tensor, indices: Sequence[int], name: str, severity: int, seed: int) -> Tensor:
    """Corrupt images as ImageNet-C does (Hendrycks and Dietterich 2019).

    Impulse noise and glass blur draw from generators that cannot be seeded: to show every model the
    same images, save them.

    Args:
        images: uint8, shape (B, 3, H, W), at least 32 pixels a side.
        indices: Index of each image, shape (B,); its noise depends only on this and the seed.
        name: A corruption of the package imagecorruptions; `corruptions` checks it.
        severity: 1 to 5.
        seed: Seed of the noise.

    Returns:
        uint8, same shape.
    """
    package = import_module("imagecorruptions")
    corrupted = []
    for image, index in zip(images, indices, strict=True):
        generator = make_generator(seed, Draw.PERTURBATION, int(index))
        np.random.seed(int(torch.randint(2**32, (), generator=generator)))
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        pixels = package.corrupt(pixels, severity=severity, corruption_name=name)
        corrupted.append(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
    return torch.stack(corrupted)


def attacks(
    backbone: Backbone, names: Sequence[str], eps: Sequence[float], seed: int, num_steps: int
) -> dict[str, Alteration]:
    """Return `NAME EPS/255` -> attack on a classifier, for all pairs of names and eps.

    Args:
        backbone: The classifier to mislead.
        names: `"fgsm"` or `"pgd"` each.
        eps: Maximal changes of a pixel, in units of 1/255.
        seed: Seed of the noise from which `pgd` starts.
        num_steps: Gradient steps of `pgd`.

    Raises:
        InputError: Unknown name.
    """
    by_name = {
        "fgsm": lambda images, indices, e: fgsm(backbone, images, e),
        "pgd": lambda images, indices, e: pgd(backbone, images, e, seed, indices, num_steps),
    }
    for name in names:
        if name not in by_name:
            raise unknown("attack", name, by_name)

    def alter(images: Tensor, indices: Sequence[int], name: str, e: float) -> Tensor:
        originals = from_uint8(images.to(backbone.device))
        return to_uint8(by_name[name](originals, indices, e)).cpu()

    return {f"{n} {e}/255": partial(alter, name=n, e=e) for n, e in product(names, eps)}


def fgsm(backbone: Backbone, images: Tensor, eps: float) -> Tensor:
    """Make adversarial examples by the fast gradient sign method (Goodfellow et al. 2015, Sec. 4).

    Args:
        backbone: The classifier to lead away from its own predictions.
        images: Shape (B, 3, H, W) in [-1, 1].
        eps: Maximal change of a pixel, in units of 1/255.

    Returns:
        Images in [-1, 1], rounded to 8-bit values, same shape.

    Raises:
        InputError: eps out of range.
    """
    return _ascend(backbone, images, images, eps, num_steps=1, step_size=eps)


def pgd(
    backbone: Backbone,
    images: Tensor,
    eps: float,
    seed: int,
    indices: Sequence[int],
    num_steps: int = 10,
) -> Tensor:
    """Make adversarial examples by projected gradient descent (Madry et al. 2018, Eq. 3).

    It starts from the image plus uniform noise within eps and takes steps of 2.5 eps / num_steps,
    as in the paper.

    Args:
        backbone: The classifier to lead away from its own predictions.
        images: Shape (B, 3, H, W) in [-1, 1].
        eps: Maximal change of a pixel, in units of 1/255.
        seed: Seed of the noise.
        indices: Index of each image, shape (B,); its noise depends only on this and the seed.
        num_steps: Gradient steps.

    Returns:
        Images in [-1, 1], rounded to 8-bit values, same shape.

    Raises:
        InputError: eps or num_steps out of range.
    """
    generators = [make_generator(seed, Draw.PERTURBATION, int(index)) for index in indices]
    noise = [torch.rand(images.shape[1:], generator=g) * 2 - 1 for g in generators]
    start = images + 2 * eps / 255 * torch.stack(noise).to(images)
    return _ascend(backbone, images, start, eps, num_steps, 2.5 * eps / max(num_steps, 1))


def _ascend(
    backbone: Backbone,
    images: Tensor,
    start: Tensor,
    eps: float,
    num_steps: int,
    step_size: float,
) -> Tensor:
    """Ascend the cross-entropy by the sign of its gradient, within eps of the images."""
    if not 0 < eps <= 255 or num_steps < 1:
        raise InputError(
            f"eps is {eps} and num_steps {num_steps}, expected eps above 0 and up to 255 (in units "
            "of 1/255), and at least 1 step."
        )
    radius, step = 2 * eps / 255, 2 * step_size / 255
    low, high = (images - radius).clamp(min=-1), (images + radius).clamp(max=1)
    with torch.no_grad():
        labels = backbone.classify(images).argmax(dim=1)
    adversarial = start.clamp(low, high)
    for _ in range(num_steps):
        with torch.enable_grad():
            adversarial = adversarial.detach().requires_grad_()
            loss = F.cross_entropy(backbone.classify(adversarial), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = (adversarial.detach() + step * gradient.sign()).clamp(low, high)
    return eight_bit(adversarial)
