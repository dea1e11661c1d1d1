"""Difference: what two models disagree on, drawn by a diffusion prior that they share.

From an image, images are drawn twice with the same noise. Both times they keep the features that
model A sees; those of model B they keep once, and once move as far as they can. Where the two
differ is what B looks at and A does not. Two copies of one model show nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from featinv.analysis.information import predictor
from featinv.metrics import spatial_cosine
from featinv.models.featinv import FeatInv
from featinv.sampling import sample_images
from featinv.utils.errors import InputError
from featinv.utils.seeding import Draw, make_generator

Distance = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> (B,)


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
    """Draw images that keep what both models see, and others that keep A's features and move B's.

    They are drawn from the prior, without a condition, guided down d_A + weight d_B and down
    d_A - weight d_B with the distances d of `feature_distance`. For two copies of one model these
    are (1 + weight) d_A and (1 - weight) d_A: as guidance follows the direction of the gradient
    alone, both draw the same.

    Args:
        model: A prior, or a FeatInv, whose condition is dropped.
        images: Whose features are kept and moved, shape (B, 3, H, W) in [-1, 1], drawn at once.
        a: Backbone whose features are kept.
        b: Backbone whose features are kept, then moved.
        weight: Of B's features beside A's, between 0 and 1. The more, the further B's are moved and
            the less A's are kept.
        num_samples: Pairs for each image. Both images of a pair draw from the generator
            (seed, indices[i], s).
        seed: Seed of the noise.
        indices: The images' own numbers, shape (B,); `None` counts them from 0.
        **options: Values of the sampler, as for `FeatInv.invert`; guidance must be on.

    Returns:
        The images that keep both and those that move, each (B, num_samples, 3, H, W), in [-1, 1].

    Raises:
        InputError: A weight out of its range, or a sampler that does not guide.
    """
    if not 0 < weight < 1:
        raise InputError(
            f"The weight of moving away is {weight}, expected between 0 and 1, for example 0.9: "
            "from 1 on, two copies of one model would be moved away from what both keep."
        )
    settings = model.settings(**options)
    if not settings.guides_features:
        raise InputError(
            "sampler.feature_guidance_scale is 0, which draws without a look at any features: "
            "expected above 0, for example 10."
        )
    indices = range(len(images)) if indices is None else indices
    to_a, to_b = (feature_distance(backbone, images) for backbone in (a, b))

    @torch.no_grad()
    def samples(weight: float) -> Tensor:
        drawn = [
            sample_images(
                predictor(model, None),
                lambda images: to_a(images) + weight * to_b(images),
                settings,
                model.diffusion,
                model.codec,
                model.latent_shape,
                [make_generator(seed, Draw.SAMPLING, int(i), s) for i in indices],
            )
            for s in range(num_samples)
        ]
        return torch.stack(drawn, dim=1)

    return samples(weight), samples(-weight)


def feature_distance(backbone: nn.Module, images: Tensor) -> Distance:
    """Return the distance 1 - spatial cosine of an image's features to those of given images.

    Args:
        backbone: Sees the features.
        images: Shape (B, 3, H, W) in [-1, 1].
    """
    with torch.no_grad():
        features = backbone.features(images)
    return lambda drawn: 1 - spatial_cosine(backbone.features(drawn), features)


def difference_map(both: Tensor, moved: Tensor) -> Tensor:
    """Return where pairs of images differ: the mean squared difference over samples and colours.

    Args:
        both: Shape (B, S, 3, H, W) in [-1, 1].
        moved: Same shape.

    Returns:
        Shape (B, H, W), in units of the 0..1 pixel range, squared.
    """
    return ((both - moved) / 2).square().mean(dim=(1, 2))


def share(difference: Tensor, region: Tensor) -> Tensor:
    """Return how much of a difference lies in a region: 0 to 1, shape (B,); 0 where there is none.

    Args:
        difference: From `difference_map`, shape (B, H, W).
        region: bool, shape (H, W).
    """
    total = difference.sum(dim=(1, 2))
    return difference[:, region].sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
