"""Score a batch of reconstructions against their originals."""

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

INVERTED = "inverted"  # name of the inverted backbone among the classifiers

# Classifier -> features (B, C, h, w) and logits (B, classes)
Outputs = dict[str, tuple[Tensor, Tensor]]
Scores = dict[str, Tensor]  # metric -> (B, S), one number per version of an image


@dataclass
class Scored:
    """Scores of B images with S reconstructions each, and what further comparisons need.

    Attributes:
        scores: Row -> scores, (B, S) or (B, 1).
        images: Row -> one image each, (B, 3, H, W), for distances between sets.
        outputs: Row -> the classifiers' features and logits of these images.
        original: Those that other images are compared with, (B, ...).
        samples: Those of all reconstructions, (B S, ...).
    """

    scores: dict[str, Scores]
    images: dict[str, Tensor]
    outputs: dict[str, Outputs]
    original: Outputs
    samples: Outputs


class Scorer:
    """Compares originals with their reconstructions, and with what resolution and codec allow.

    Args:
        model: The model that reconstructs.
        witnesses: Name -> classifier.
        lpips: Whether to compare by LPIPS as well.

    Raises:
        InputError: The weights of LPIPS are unavailable.
    """

    def __init__(self, model: Inverter, witnesses: Mapping[str, Backbone], lpips: bool) -> None:
        self.model = model
        self.classifiers = {INVERTED: model.backbone, **witnesses}
        self.pixel_metrics: dict[str, PixelMetric] = {"psnr": psnr, "contrast": contrast}
        if lpips:
            self.pixel_metrics["lpips"] = load_lpips()

    def outputs(self, images: Tensor) -> Outputs:
        """Return the features and logits of images (B, 3, H, W) in [-1, 1]."""
        found = {}
        for name, backbone in self.classifiers.items():
            features, logits = backbone.to(images.device).features_and_logits(images)
            if not backbone.classifies:
                logits = features.new_zeros(len(images), 0)
            found[name] = (features, logits)
        return found

    def score(self, images: Tensor, full_size: Outputs, samples: Tensor) -> Scored:
        """Score reconstructions, the originals at the model's resolution, and through the codec.

        Args:
            images: Originals, shape (B, 3, H, W), in [-1, 1].
            full_size: `outputs(images)`.
            samples: Reconstructions in [-1, 1], rounded to 8-bit values, shape (B, S, 3, h, w).
        """
        small = resize(images, self.model.image_size)
        pictures = {"ceiling": eight_bit(small)}
        if codec := getattr(self.model, "codec", None):
            pictures["codec"] = eight_bit(codec.decode(codec.encode(small)))
        outputs = {row: self.outputs(values) for row, values in pictures.items()}
        # The model inverts features of the full-resolution original. Witnesses compare with the
        # original at the model's resolution, so details that it cannot draw do not count.
        original = outputs["ceiling"] | {INVERTED: full_size[INVERTED]}

        ceiling = compare({INVERTED: original[INVERTED]}, outputs["ceiling"])
        rows = {"ceiling": ceiling | {"saturated": saturated_share(pictures["ceiling"])[:, None]}}
        if codec:
            pixels = self._compare_pixels(pictures["ceiling"], pictures["codec"])
            rows["codec"] = compare(original, outputs["codec"]) | pixels
        flat = samples.flatten(0, 1)
        drawn = self.outputs(flat)
        scores = compare(original, drawn) | self._compare_pixels(pictures["ceiling"], flat)
        best = scores["spatial_cosine"].argmax(1, keepdim=True)
        rows["reconstruction"] = dict(scores)
        rows["best"] = {name: value.gather(1, best) for name, value in scores.items()}
        number, num_samples = samples.shape[:2]
        if num_samples > 1:
            between, to_original = sample_distances(samples / 2, pictures["ceiling"] / 2)
            spread = pixel_spread(samples).mean(dim=(1, 2))
            values = {"diversity": spread, "between_samples": between, "to_original": to_original}
            rows["reconstruction"] |= {name: value[:, None] for name, value in values.items()}
        first = torch.arange(number, device=images.device) * num_samples
        for row, i in {"reconstruction": first, "best": first + best[:, 0]}.items():
            pictures[row], outputs[row] = flat[i], rows_of(drawn, i)
        pictures, outputs = {"original": images} | pictures, {"original": full_size} | outputs
        return Scored(rows, pictures, outputs, original, drawn)

    def _compare_pixels(self, originals: Tensor, images: Tensor) -> Scores:
        """Compare images (B S, 3, H, W), S versions of each original, with originals (B, ...)."""
        repeated = originals.repeat_interleave(len(images) // len(originals), 0)
        scores = {name: metric(repeated, images) for name, metric in self.pixel_metrics.items()}
        scores["saturated"] = saturated_share(images)
        return {name: value.view(len(originals), -1) for name, value in scores.items()}


def rows_of(outputs: Outputs, rows: Tensor | slice) -> Outputs:
    """Copy the features and logits of some of the images."""
    return {name: tuple(value[rows].clone() for value in pair) for name, pair in outputs.items()}


def compare(original: Outputs, other: Outputs) -> Scores:
    """Compare features and logits of originals with those of other versions of them.

    Args:
        original: Of B images; only its classifiers are compared.
        other: Of B S images, S versions of each original in a row.

    Returns:
        `spatial_cosine`, `pooled_cosine`, `relative_l2` and, with classes, `top1_agreement` and
        `top5_agreement` in the inverted backbone; `NAME_cosine` (spatial) and `NAME_top1` for each
        witness. Each has shape (B, S).
    """
    scores = {}
    for name, pair in original.items():
        times = len(other[name][0]) // len(pair[0])
        features, logits = (value.repeat_interleave(times, 0) for value in pair)
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
