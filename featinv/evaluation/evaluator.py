"""Evaluation: reconstruct held-out images, score them beside ceiling and floor, write it down."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from featinv.evaluation.figures import reconstruction_figure, save_figure
from featinv.evaluation.set_metrics import NEIGHBOUR, Extractor, compare_sets, distance_name
from featinv.evaluation.tables import csv_table, format_interval, markdown_table
from featinv.metrics import (
    FeatureFidelity,
    PixelMetric,
    bootstrap_interval,
    load_lpips,
    pixel_spread,
    pooled_cosine,
    psnr,
    relative_l2,
    spatial_cosine,
    top_k_agreement,
)
from featinv.models.base import Inverter
from featinv.utils.distributed import rank_and_world, share_rows
from featinv.utils.errors import InputError, at_least, unknown
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8
from featinv.utils.precision import PRECISIONS

METRICS = {
    "spatial_cosine": "spatial cosine",
    "pooled_cosine": "pooled cosine",
    "relative_l2": "relative L2",
    "top1_agreement": "top-1 agreement",
    "top5_agreement": "top-5 agreement",
}
TITLES = METRICS | {"psnr": "PSNR (dB)", "lpips": "LPIPS", "diversity": "diversity"}
# What is compared with an original's own features and predictions.
OWN = {
    "ceiling": "ceiling: the original at the model's resolution",
    "codec": "codec: the original through the codec",
    "reconstruction": "reconstruction",
    "best": "best reconstruction of an image, by its spatial cosine",
}
OTHER = {
    "shuffled": "shuffled: reconstruction of another image",
    "floor": "floor: another image",
}


class Evaluator:
    """Scores of reconstructions on a set of images.

    All images go through 8 bits before they are scored. "Another image" is the one before in the
    set (the last one for the first), so no number depends on the batch size. The Frechet distance
    is between the originals and as many others: the first sample of each.

    Ranks share the drawing, which takes nearly all the time: each has to be given the same images,
    and each has all the scores in the end.

    Args:
        model: A trained model, in eval mode.
        num_samples: Reconstructions of each image; its score is the mean over them.
        seed: Seed of the sampling noise.
        batch_size: Reconstructions drawn at once.
        num_pictures: How many images the figure shows, from the start of the set.
        sampler: Values that replace the model's own: `num_steps`, `guidance_scale`, `scheduler`.
        extractors: In whose features sets of images are compared: names of `Extractor`.
        precision: `"32-true"`, or `"bf16-mixed"` to draw in bfloat16, which is faster; all scores
            are computed in float32.
        lpips: Whether images are also compared by LPIPS, which downloads its network's weights.

    Raises:
        InputError: A value out of its range, a model without a condition, or weights of an
            extractor or of LPIPS that cannot be had.
    """

    def __init__(
        self,
        model: Inverter,
        num_samples: int = 4,
        seed: int = 0,
        batch_size: int = 32,
        num_pictures: int = 6,
        sampler: dict | None = None,
        precision: str = "32-true",
        extractors: Sequence[str] = ("lite0",),
        lpips: bool = False,
    ) -> None:
        self.num_samples = at_least("num_samples", num_samples, 1)
        self.seed = at_least("seed", seed, 0)
        self.batch_size = at_least("batch_size", batch_size, 1)
        self.num_pictures = at_least("num_pictures", num_pictures, 1)
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        self.precision = precision
        self.model = model
        self._options = sampler or {}
        self.settings = model.settings(**self._options)
        if not model.reconstructs(self.settings):
            raise InputError(
                "The checkpoint is a prior, trained without a condition: it cannot reconstruct; "
                "expected one trained with conditioning=spatial or conditioning=pooled, or "
                "sampler.feature_guidance_scale or sampler.forward_guidance_scale above 0."
            )
        self.keys: dict[int, str] = {}
        self.seconds = 0.0  # spent on sampling and decoding
        self._own_rows = [row for row in OWN if row != "codec" or hasattr(model, "codec")]
        self._pixel_metrics: dict[str, PixelMetric] = {"psnr": psnr}
        if lpips:
            self._pixel_metrics["lpips"] = load_lpips(model.device)
        own = [f"{row}/{name}" for row in self._own_rows for name in METRICS]
        # Pixels are compared with those of the ceiling, which comes first.
        own += [f"{row}/{name}" for row in self._own_rows[1:] for name in self._pixel_metrics]
        own += ["reconstruction/diversity"] if num_samples > 1 else []
        other = [f"{row}/{name}" for row in OTHER for name in METRICS]
        # Every rank has all the rows: there is nothing to gather.
        self._own, self._other = (FeatureFidelity(n, sync_on_compute=False) for n in (own, other))
        self._extractors = [Extractor(name) for name in extractors]
        rows = ("original", *self._own_rows)
        self._extracted: dict[str, dict[str, list[Tensor]]] = {
            extractor.name: {row: [] for row in rows} for extractor in self._extractors
        }
        self._distances: dict[str, dict[str, dict[str, float]]] | None = None
        self._pictures: list[dict] = []

    @torch.no_grad()
    def run(self, batches: Iterable[dict], total: int | None = None) -> None:
        """Reconstruct and score every image of a data loader.

        Args:
            batches: Batches of a data module of `featinv.data`.
            total: Number of images, for the progress bar.

        Raises:
            InputError: There is no image.
        """
        first = previous = None
        silent = rank_and_world()[0] > 0
        with tqdm(total=total, unit="img", desc="evaluate", disable=silent) as bar:
            for batch in batches:
                scored = self._score(batch)
                if previous is not None:
                    self._compare_others(previous[-1:], scored[:1])
                self._compare_others(scored[:-1], scored[1:])
                first, previous = first or scored[:1], scored
                bar.update(len(scored))
        if previous is None:
            raise InputError("There is no image to evaluate: the data set is empty.")
        if len(self.keys) > 1:
            self._compare_others(previous[-1:], first)

    def _score(self, batch: dict) -> list[dict]:
        """Score a batch against its own originals; return what the next images are compared to."""
        backbone, device = self.model.backbone, self.model.device
        images = from_uint8(batch["image"].to(device))
        original = backbone.features_and_logits(images)

        start = time.perf_counter()
        samples = share_rows(
            lambda rows: self._draw(original[0][rows], batch["index"][rows].tolist()), len(images)
        )
        self.seconds += time.perf_counter() - start
        samples = from_uint8(samples)  # (B, S, 3, H, W)

        small = resize(images, self.model.image_size)
        references = {"ceiling": eight_bit(small)}
        if codec := getattr(self.model, "codec", None):
            references["codec"] = eight_bit(codec.decode(codec.encode(small)))
        drawn = backbone.features_and_logits(samples.flatten(0, 1))
        drawn_scores = self._by_sample(original, drawn)
        drawn_scores |= self._compare_pixels(references["ceiling"], samples.flatten(0, 1))
        best = drawn_scores["spatial_cosine"].argmax(1)
        everyone = torch.arange(len(images), device=device)
        drawn_images = {"reconstruction": samples[:, 0], "best": samples[everyone, best]}
        self._extract({"original": images, **references, **drawn_images})
        rows = {
            row: _compare(original, backbone.features_and_logits(view))
            for row, view in references.items()
        }
        if "codec" in references:
            pixels = self._compare_pixels(references["ceiling"], references["codec"])
            rows["codec"] |= {name: value[:, 0] for name, value in pixels.items()}
        rows["reconstruction"] = {name: value.mean(1) for name, value in drawn_scores.items()}
        rows["best"] = {name: value[everyone, best] for name, value in drawn_scores.items()}
        if self.num_samples > 1:
            rows["reconstruction"]["diversity"] = pixel_spread(samples).mean(dim=(1, 2))
        self._own.update(batch["index"], _flatten(rows))
        self.keys |= dict(zip(batch["index"].tolist(), batch["key"], strict=True))
        self._keep_pictures(batch, samples, drawn_scores["spatial_cosine"])
        drawn = [value.unflatten(0, (-1, self.num_samples)) for value in drawn]
        return [
            {
                "index": batch["index"][i : i + 1],
                "original": [value[i : i + 1] for value in original],
                "drawn": [value[i] for value in drawn],
            }
            for i in range(len(images))
        ]

    def _draw(self, features: Tensor, indices: list[int]) -> Tensor:
        """Return reconstructions as they are scored and shown, uint8, (B, S, 3, H, W)."""
        samples = self.model.invert(
            features,
            self.num_samples,
            seed=self.seed,
            indices=indices,
            batch_size=self.batch_size,
            precision=self.precision,
            **self._options,
        )
        return to_uint8(samples)

    def _extract(self, images: dict[str, Tensor]) -> None:
        self._distances = None  # they are those of fewer images
        for extractor in self._extractors:
            for row, batch in images.items():
                self._extracted[extractor.name][row].append(extractor(batch).cpu())

    def _by_sample(self, reference: tuple, drawn: tuple) -> dict[str, Tensor]:
        """Compare every sample (B S, ...) with its original (B, ...): (B, S) for each metric."""
        repeated = [value.repeat_interleave(self.num_samples, 0) for value in reference]
        return {
            name: value.view(-1, self.num_samples)
            for name, value in _compare(repeated, drawn).items()
        }

    def _compare_pixels(self, originals: Tensor, views: Tensor) -> dict[str, Tensor]:
        """Compare S views of each original, (B S, ...) with (B, ...): (B, S) for each metric."""
        repeated = originals.repeat_interleave(len(views) // len(originals), 0)
        return {
            name: metric(repeated, views).view(len(originals), -1)
            for name, metric in self._pixel_metrics.items()
        }

    def _compare_others(self, others: list[dict], images: list[dict]) -> None:
        """Compare each image with the original and the reconstructions of the one before it."""
        for other, image in zip(others, images, strict=False):
            shuffled = self._by_sample(image["original"], other["drawn"])
            rows = {
                "shuffled": {name: value.mean(1) for name, value in shuffled.items()},
                "floor": _compare(image["original"], other["original"]),
            }
            self._other.update(image["index"], _flatten(rows))

    def _keep_pictures(self, batch: dict, samples: Tensor, cosine: Tensor) -> None:
        for i in range(min(len(samples), self.num_pictures - len(self._pictures))):
            self._pictures.append(
                {
                    "key": batch["key"][i],
                    "original": batch["image"][i],
                    "samples": to_uint8(samples[i]).cpu(),
                    "spread": pixel_spread(samples[i : i + 1])[0].cpu(),
                    "cosine": cosine[i].cpu(),
                }
            )

    def per_image(self) -> dict[str, Tensor]:
        """Return `"row/metric"` -> one float per image, in the order of the set."""
        # Pairs are missing while a run is under way, and there are none for a single image.
        other = self._other.compute() if len(self.keys) > 1 else {}
        return self._own.compute() | {name: value for name, value in other.items() if len(value)}

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return row -> metric -> mean and 95% bootstrap interval over the images."""
        summary: dict[str, dict] = {}
        for name, values in self.per_image().items():
            row, metric = name.split("/")
            low, high = bootstrap_interval(values)
            mean = float(values.double().mean())
            summary.setdefault(row, {})[metric] = {"mean": mean, "low": low, "high": high}
        return summary

    def distances(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return extractor -> row -> how far its images are, as a set, from the originals.

        Those of `set_metrics.compare_sets` in the extractor's features: a Frechet distance only
        of more images than it has features, and nothing for very few images.
        """
        if len(self.keys) <= NEIGHBOUR:
            return {}
        if self._distances is None:
            self._distances = {}
            for name, extracted in self._extracted.items():
                sets = {row: torch.cat(parts) for row, parts in extracted.items()}
                real = sets.pop("original")
                self._distances[name] = {r: compare_sets(real, fake) for r, fake in sets.items()}
        return self._distances

    def table_rows(self) -> list[dict[str, str]]:
        """Return the rows of the table, as text, best row first."""
        summary, distances = self.summary(), self.distances()
        rows = []
        for row, title in (OWN | OTHER).items():
            if row in summary:
                cells = {TITLES[m]: format_interval(**v) for m, v in summary[row].items()}
                for extractor, sets in distances.items():
                    if "fd" in sets.get(row, {}):
                        cells[distance_name("fd", extractor)] = f"{sets[row]['fd']:.2f}"
                rows.append({"compared with the original": title, **cells})
        return rows

    def caption(self) -> str:
        """Return a sentence that says what the numbers are."""
        per_reconstruction = self.seconds / max(1, len(self.keys) * self.num_samples)
        return (
            f"{len(self.keys)} images, {self.num_samples} samples each, seed {self.seed}; "
            f"{self.settings.describe()}; {per_reconstruction:.3f} s per reconstruction on "
            f"{self.model.device.type} in {self.precision}; mean over images with 95% bootstrap "
            "interval. "
            f"Backbone {self.model.backbone.name}, layer {self.model.backbone.layer}, "
            f"conditioning {self.model.conditioning}."
        )

    def save(self, folder: str | Path, command: str, **about: object) -> None:
        """Write `metrics.json`, `table.md`, `per_image.csv` and `reconstructions.png`.

        Args:
            folder: Where to; it must exist.
            command: What was typed to get here, to stand beside the numbers.
            about: Further entries of `metrics.json`, e.g. the checkpoint's path.
        """
        folder = Path(folder)
        metrics = {
            "rows": self.summary(),
            "sets": self.distances(),
            "num_images": len(self.keys),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "sampler": asdict(self.settings),
            "precision": self.precision,
            "seconds_per_reconstruction": self.seconds / (len(self.keys) * self.num_samples),
            "device": str(self.model.device),
            "command": command,
            **about,
        }
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        (folder / "table.md").write_text(
            f"{markdown_table(self.table_rows())}\n{self.caption()}\n\nMade by `{command}`.\n"
        )
        values = self.per_image()
        rows = [
            {"index": str(index), "key": self.keys[index]}
            | {name: f"{v[i]:.6f}" for name, v in values.items() if len(v) == len(self.keys)}
            for i, index in enumerate(sorted(self.keys))
        ]
        (folder / "per_image.csv").write_text(csv_table(rows))
        save_figure(self.figure(), folder / "reconstructions.png")

    def figure(self):
        """Return the figure: original, samples and spread of the first images."""
        stack = {name: [p[name] for p in self._pictures] for name in self._pictures[0]}
        return reconstruction_figure(
            torch.stack(stack["original"]),
            torch.stack(stack["samples"]),
            torch.stack(stack["spread"]),
            captions=stack["key"],
            scores=torch.stack(stack["cosine"]),
            title=f"{self.model.backbone.name}, layer {self.model.backbone.layer}, "
            f"{self.model.conditioning} features: originals and reconstructions",
        )


def _compare(reference: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Compare (features, logits) with (features, logits): every metric, shape (B,)."""
    return {
        "spatial_cosine": spatial_cosine(reference[0], other[0]),
        "pooled_cosine": pooled_cosine(reference[0], other[0]),
        "relative_l2": relative_l2(reference[0], other[0]),
        "top1_agreement": top_k_agreement(reference[1], other[1], 1),
        "top5_agreement": top_k_agreement(reference[1], other[1], 5),
    }


def _flatten(rows: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{row}/{name}": value for row, values in rows.items() for name, value in values.items()
    }
