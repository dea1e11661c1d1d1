"""Scores of a batch of reconstructions: how alike they are to their originals."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from featinv.backbones import Backbone
from featinv.metrics import (
    PixelMetric,
    contrast,
    load_lpips,
    pixel_spread,
    pooled_cosine,
    psnr,
    relative_l2,
    sample_distances,
    saturated_share,
    spatial_cosine,
    top_k_agreement,
)
from featinv.models.base import Inverter
from featinv.utils.pixels import eight_bit, resize

INVERTED = "inverted"  # the backbone whose features are inverted, among the witnesses

View = dict[str, tuple[Tensor, Tensor]]  # classifier -> features (B, C, h, w), logits (B, classes)
Scores = dict[str, Tensor]  # metric -> one number for each of S versions of an image, (B, S)


@dataclass
class Scored:
    """What is left of a batch of B images and S reconstructions of each.

    Attributes:
        scores: Row -> scores, (B, S) or (B, 1).
        images: Row -> images, (B, 3, H, W); of reconstructions one each, for sets of images.
        views: Row -> what the classifiers see of these.
        original: What originals are compared by.
        drawn: What is seen of all reconstructions, (B S, ...).
    """

    scores: dict[str, Scores]
    images: dict[str, Tensor]
    views: dict[str, View]
    original: View
    drawn: View


class Scorer:
    """Compares reconstructions, and the best that the resolution and the codec allow, to originals.

    Args:
        model: Whose reconstructions are scored.
        witnesses: Name -> classifier.
        lpips: Whether images are also compared by LPIPS.

    Raises:
        InputError: The weights of LPIPS are unavailable.
    """

    def __init__(self, model: Inverter, witnesses: Mapping[str, Backbone], lpips: bool) -> None:
        self.model = model
        self.classifiers = {INVERTED: model.backbone, **witnesses}
        self.pixel_metrics: dict[str, PixelMetric] = {"psnr": psnr, "contrast": contrast}
        if lpips:
            self.pixel_metrics["lpips"] = load_lpips()

    def look(self, images: Tensor) -> View:
        """Return what each classifier sees of images (B, 3, H, W) in [-1, 1]."""
        view = {}
        for name, backbone in self.classifiers.items():
            features, logits = backbone.to(images.device).features_and_logits(images)
            # Without classes there are none to agree about.
            view[name] = (
                features,
                logits if backbone.classifies else features.new_zeros(len(images), 0),
            )
        return view

    def score(self, images: Tensor, whole: View, samples: Tensor) -> Scored:
        """Score reconstructions, and the best that the resolution and the codec allow.

        Args:
            images: Originals, shape (B, 3, H, W), in [-1, 1].
            whole: What `look` sees of them.
            samples: Their reconstructions, 8-bit values in [-1, 1], shape (B, S, 3, h, w).
        """
        small = resize(images, self.model.image_size)
        shown = {"ceiling": eight_bit(small)}
        if codec := getattr(self.model, "codec", None):
            shown["codec"] = eight_bit(codec.decode(codec.encode(small)))
        views = {row: self.look(view) for row, view in shown.items()}
        # The model inverts what the backbone saw of the whole original. What a witness says of
        # details that the model cannot draw is no matter.
        original = views["ceiling"] | {INVERTED: whole[INVERTED]}

        ceiling = compare({INVERTED: original[INVERTED]}, views["ceiling"])
        rows = {"ceiling": ceiling | {"saturated": saturated_share(shown["ceiling"])[:, None]}}
        if codec:
            pixels = self._compare_pixels(shown["ceiling"], shown["codec"])
            rows["codec"] = compare(original, views["codec"]) | pixels
        flat = samples.flatten(0, 1)
        drawn = self.look(flat)
        scores = compare(original, drawn) | self._compare_pixels(shown["ceiling"], flat)
        best = scores["spatial_cosine"].argmax(1, keepdim=True)
        rows["reconstruction"] = dict(scores)
        rows["best"] = {name: value.gather(1, best) for name, value in scores.items()}
        number, num_samples = samples.shape[:2]
        if num_samples > 1:
            between, to_original = sample_distances(samples / 2, shown["ceiling"] / 2)
            spread = pixel_spread(samples).mean(dim=(1, 2))
            values = {"diversity": spread, "between_samples": between, "to_original": to_original}
            rows["reconstruction"] |= {name: value[:, None] for name, value in values.items()}
        first = torch.arange(number, device=images.device) * num_samples
        for row, i in {"reconstruction": first, "best": first + best[:, 0]}.items():
            shown[row], views[row] = flat[i], rows_of(drawn, i)
        return Scored(
            rows, {"original": images} | shown, {"original": whole} | views, original, drawn
        )

    def _compare_pixels(self, originals: Tensor, images: Tensor) -> Scores:
        """Compare S versions of each original, (B S, ...), with it, (B, ...)."""
        repeated = originals.repeat_interleave(len(images) // len(originals), 0)
        scores = {name: metric(repeated, images) for name, metric in self.pixel_metrics.items()}
        scores["saturated"] = saturated_share(images)
        return {name: value.view(len(originals), -1) for name, value in scores.items()}


def rows_of(view: View, rows: Tensor | slice) -> View:
    """Return a copy of what the classifiers see of some of the images."""
    return {name: tuple(value[rows].clone() for value in seen) for name, seen in view.items()}


def compare(original: View, other: View) -> Scores:
    """Compare what classifiers see of images with what they see of their originals.

    Args:
        original: Of B images; compared is what the classifiers named here see.
        other: Of S versions of each original, one after the other.

    Returns:
        Of the inverted backbone `spatial_cosine`, `pooled_cosine`, `relative_l2`, and if it has
        classes `top1_agreement` and `top5_agreement`; of a witness called lite2 `lite2_cosine`
        (spatial) and `lite2_top1`.
    """
    scores = {}
    for name, seen in original.items():
        times = len(other[name][0]) // len(seen[0])
        features, logits = (value.repeat_interleave(times, 0) for value in seen)
        other_features, other_logits = other[name]
        cosine = spatial_cosine(features, other_features)
        if name == INVERTED:
            scores["spatial_cosine"] = cosine
            scores["pooled_cosine"] = pooled_cosine(features, other_features)
            scores["relative_l2"] = relative_l2(features, other_features)
            for k in (1, 5) if logits.shape[1] else ():
                scores[f"top{k}_agreement"] = top_k_agreement(logits, other_logits, k)
        else:
            scores[f"{name}_cosine"] = cosine
            scores[f"{name}_top1"] = top_k_agreement(logits, other_logits, 1)
    number = len(next(iter(original.values()))[0])
    return {metric: values.view(number, -1) for metric, values in scores.items()}
