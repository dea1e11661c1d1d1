"""Difference: what one model sees in an image and another does not, drawn by a diffusion prior.

An image is redrawn so that models A and B both keep their features. Two walks start from each
redrawn image, under the same random transformations: both keep A's features, but one keeps B's as
well while the other moves them. Where they end differently, B looks at something that A ignores.
Two copies of one model show no difference.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from featinv.analysis.information import predictor
from featinv.guidance import into_pixel_range, polish
from featinv.metrics import spatial_cosine
from featinv.models.featinv import FeatInv
from featinv.sampling import sample_images
from featinv.transforms import PixelNoise, ShiftAndZoom, transform_all
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import resize
from featinv.utils.seeding import Draw, make_generator

STRENGTH = 0.5  # share of the denoising steps that redraw
WALK_STEPS = 20
WALK_STEP_SIZE = 0.02  # root mean square of a walk's first step, in the latents' units
# Stronger than a sampler's: meaningless patterns that move features survive weak ones.
TRANSFORMS = (ShiftAndZoom(shift=4.0, zoom=0.1), PixelNoise(high=0.2, low=0.2))


def draw_pairs(
    model: FeatInv,
    images: Tensor,
    a: nn.Module,
    b: nn.Module,
    weight: float = 0.5,
    num_samples: int = 4,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """Draw pairs of images: one keeps the features of models A and B, the other only those of A.

    With distances d = 1 - spatial cosine to the image's features, the prior redraws each image
    without a condition, guided down d_A + weight d_B (SDEdit, Meng et al. 2022, arXiv 2108.01073).
    The two walks then descend d_A + weight d_B and d_A - weight d_B, by `guidance.polish`. For two
    copies of one model these are (1 + weight) d_A and (1 - weight) d_A, whose walks are identical,
    since steps follow only the direction of the gradient.

    Sampling the two images separately would not work: it amplifies any difference, even rounding
    errors, until the whole image differs.

    Args:
        model: A prior, or a FeatInv whose condition is dropped.
        images: Shape (B, 3, H, W) in [-1, 1]; drawn as one batch.
        a: Backbone A.
        b: Backbone B.
        weight: Weight of B's features, between 0 and 1. A larger one moves B's features further and
            keeps A's less well.
        num_samples: Pairs per image. Pair s draws from generators (seed, indices[i], s).
        seed: Seed of all noise.
        indices: Index of each image, shape (B,); `None` counts from 0.
        **options: Values of the sampler, as for `FeatInv.invert`; feature guidance must be on.

    Returns:
        Images that keep both, and images that move B's features, each of shape
        (B, num_samples, 3, H, W) in [-1, 1].

    Raises:
        InputError: A value out of range, or a sampler without feature guidance.
    """
    if not 0 < weight < 1:
        raise InputError(f"weight is {weight}, expected between 0 and 1, for example 0.5.")
    settings = model.settings(**options)
    if not settings.guides_features:
        raise InputError(
            "sampler.feature_guidance_scale is 0, which ignores all features: expected above 0, "
            "for example 10."
        )
    indices = range(len(images)) if indices is None else indices
    codec, project = model.codec, into_pixel_range(model.codec)
    with torch.no_grad():
        references = [backbone.features(images) for backbone in (a, b)]

    def distance(drawn: Tensor, weight: float) -> Tensor:
        to_a, to_b = (
            1 - spatial_cosine(backbone.features(drawn), reference)
            for backbone, reference in zip((a, b), references, strict=True)
        )
        return to_a + weight * to_b

    def walk(z_0: Tensor, weight: float, s: int) -> Tensor:
        generators = [make_generator(seed, Draw.PERTURBATION, int(i), s) for i in indices]
        full = torch.ones(len(z_0), device=z_0.device)

        def through_transforms(z_0: Tensor, _: Tensor) -> Tensor:
            decoded = transform_all(TRANSFORMS, codec.decode(z_0), full, generators)
            return distance(decoded, weight)

        z_0 = polish(z_0, through_transforms, WALK_STEPS, WALK_STEP_SIZE, project)
        return codec.decode(z_0).clamp(-1, 1)

    kept, moved = [], []
    with torch.no_grad():
        start = codec.encode(resize(images, model.image_size))
        for s in range(num_samples):
            drawn = sample_images(
                predictor(model, None),
                partial(distance, weight=weight),
                settings,
                model.diffusion,
                codec,
                model.latent_shape,
                [make_generator(seed, Draw.SAMPLING, int(i), s) for i in indices],
                start,
                STRENGTH,
            )
            z_0 = codec.encode(drawn)
            kept.append(walk(z_0, weight, s))
            moved.append(walk(z_0, -weight, s))
    return torch.stack(kept, dim=1), torch.stack(moved, dim=1)


def difference_map(kept: Tensor, moved: Tensor) -> Tensor:
    """Return where pairs of images differ consistently over the samples.

    An unbiased estimate of the squared expected difference delta,

        1 / (S (S - 1)) sum_{s != t} delta_s delta_t,

    which may be negative by chance. The squared mean would exceed it by variance / S.

    Args:
        kept: Shape (B, S, 3, H, W) in [-1, 1], S at least 2.
        moved: Same shape.

    Returns:
        Shape (B, H, W), averaged over the colours, in squared 0..1 pixel units.

    Raises:
        InputError: A single sample.
    """
    number = at_least("num_samples", kept.shape[1], 2)
    delta = (kept - moved) / 2
    products = delta.sum(dim=1).square() - delta.square().sum(dim=1)  # (B, 3, H, W)
    return products.mean(dim=1) / (number * (number - 1))


def share_inside(difference: Tensor, region: Tensor) -> Tensor:
    """Return the share of a difference that lies in a region.

    Args:
        difference: From `difference_map`, shape (B, H, W).
        region: bool, shape (H, W).

    Returns:
        Shape (B,), mostly in [0, 1] (maps may be negative by chance); 0 without any difference.
    """
    total = difference.sum(dim=(1, 2))
    inside = difference[:, region].sum(dim=1)
    return torch.where(total > 0, inside / total, 0)
