"""Difference: what two models disagree on, drawn by a diffusion prior that they share.

An image is redrawn so that both models keep their features. From each draw two walks lead on, with
the same random transformations: both keep the features of model A, one keeps those of model B too,
the other moves them. Where the two ends differ is what B looks at and A does not. Two copies of one
model show nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from featinv.analysis.information import predictor
from featinv.guidance import into_pixel_range, polish
from featinv.metrics import spatial_cosine
from featinv.models.featinv import FeatInv
from featinv.sampling import sample_images
from featinv.transforms import PixelNoise, ShiftAndZoom, Transform, transform_all
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import resize
from featinv.utils.seeding import Draw, make_generator

Distance = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> (B,)

# Stronger than those of a sampler: patterns that move features but mean nothing survive weak ones.
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
    *,
    strength: float = 0.5,
    walk_steps: int = 20,
    walk_step_size: float = 0.02,
    transforms: Sequence[Transform] = TRANSFORMS,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """Redraw images so that they keep what both models see, and so that they move B's features.

    With the distances d of `feature_distance`, the images are redrawn from noise by the prior,
    without a condition, guided down d_A + weight d_B (SDEdit, Meng et al. 2022, arXiv 2108.01073).
    The walks then go down d_A + weight d_B and d_A - weight d_B, by `guidance.polish`. For two
    copies of one model these are (1 + weight) d_A and (1 - weight) d_A: as the steps follow the
    direction of the gradient alone, both walks are the same.

    A whole draw for each of the two would not do: sampling amplifies differences, even rounding
    errors, until they are everywhere.

    Args:
        model: A prior, or a FeatInv, whose condition is dropped.
        images: Whose features are kept and moved, shape (B, 3, H, W) in [-1, 1], drawn at once.
        a: Backbone whose features are kept.
        b: Backbone whose features are kept, then moved.
        weight: Of B's features beside A's, between 0 and 1. The more, the further B's are moved and
            the less A's are kept.
        num_samples: Pairs for each image. Pair s draws from generators (seed, indices[i], s).
        seed: Seed of all noise.
        indices: The images' own numbers, shape (B,); `None` counts them from 0.
        strength: Share of the denoising steps that redraw, up to 1, where nothing is left of the
            image but its features.
        walk_steps: Of each walk.
        walk_step_size: Root mean square of a walk's first step, in the latents' units.
        transforms: Through which walks see the image.
        **options: Values of the sampler, as for `FeatInv.invert`; guidance must be on.

    Returns:
        The images that keep both and those that move, each (B, num_samples, 3, H, W), in [-1, 1].

    Raises:
        InputError: A value out of its range, or a sampler that does not guide.
    """
    for name, value, below in (("weight", weight, weight < 1), ("strength", strength, True)):
        if not (0 < value <= 1 and below):
            raise InputError(f"{name} is {value}, expected between 0 and 1, for example 0.5.")
    settings = model.settings(**options)
    if not settings.guides_features:
        raise InputError(
            "sampler.feature_guidance_scale is 0, which draws without a look at any features: "
            "expected above 0, for example 10."
        )
    indices = range(len(images)) if indices is None else indices
    to_a, to_b = (feature_distance(backbone, images) for backbone in (a, b))
    codec, project = model.codec, into_pixel_range(model.codec)

    def walk(z_0: Tensor, weight: float, s: int) -> Tensor:
        generators = [make_generator(seed, Draw.PERTURBATION, int(i), s) for i in indices]
        full = torch.ones(len(z_0), device=z_0.device)

        def distance(z_0: Tensor, _: Tensor) -> Tensor:
            seen = transform_all(transforms, codec.decode(z_0), full, generators)
            return to_a(seen) + weight * to_b(seen)

        z_0 = polish(z_0, distance, walk_steps, walk_step_size, project)
        return codec.decode(z_0).clamp(-1, 1)

    kept, moved = [], []
    with torch.no_grad():
        start = codec.encode(resize(images, model.image_size))
        for s in range(num_samples):
            drawn = sample_images(
                predictor(model, None),
                lambda images: to_a(images) + weight * to_b(images),
                settings,
                model.diffusion,
                codec,
                model.latent_shape,
                [make_generator(seed, Draw.SAMPLING, int(i), s) for i in indices],
                start,
                strength,
            )
            z_0 = codec.encode(drawn)
            kept.append(walk(z_0, weight, s))
            moved.append(walk(z_0, -weight, s))
    return torch.stack(kept, dim=1), torch.stack(moved, dim=1)


def feature_distance(backbone: nn.Module, images: Tensor) -> Distance:
    """Return the distance 1 - spatial cosine of an image's features to those of given images.

    Args:
        backbone: Sees the features.
        images: Shape (B, 3, H, W) in [-1, 1].
    """
    with torch.no_grad():
        features = backbone.features(images)
    return lambda drawn: 1 - spatial_cosine(backbone.features(drawn), features)


def difference_map(kept: Tensor, moved: Tensor) -> Tensor:
    """Return where pairs of images differ in the same way, whatever their noise.

    That is the square of the expected difference delta. The square of a mean over S samples would
    be too large by the variance / S; the mean over pairs of different samples is not:

        1 / (S (S - 1)) sum_{s != t} delta_s delta_t,

    which may be negative, by chance.

    Args:
        kept: Shape (B, S, 3, H, W) in [-1, 1], two samples or more.
        moved: Same shape.

    Returns:
        Shape (B, H, W), a mean over the colours, in units of the 0..1 pixel range, squared.

    Raises:
        InputError: Fewer samples.
    """
    number = at_least("num_samples", kept.shape[1], 2)
    delta = (kept - moved) / 2
    products = delta.sum(dim=1).square() - delta.square().sum(dim=1)  # (B, 3, H, W)
    return products.mean(dim=1) / (number * (number - 1))


def share(difference: Tensor, region: Tensor) -> Tensor:
    """Return how much of a difference lies in a region, shape (B,).

    Args:
        difference: From `difference_map`, shape (B, H, W).
        region: bool, shape (H, W).

    Returns:
        About 0 to 1, since a map may be negative by chance; 0 where there is no difference.
    """
    total = difference.sum(dim=(1, 2))
    inside = difference[:, region].sum(dim=1)
    return torch.where(total > 0, inside / total, 0)
