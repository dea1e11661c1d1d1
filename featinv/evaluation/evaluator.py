"""Evaluator: reconstruct held-out images and score them between floor and ceiling."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from featinv.evaluation import report
from featinv.evaluation.figures import reconstruction_figure, save_figure
from featinv.evaluation.pairing import Item, Pairing
from featinv.evaluation.scores import INVERTED, Scored, Scorer, Scores, compare, rows_of
from featinv.evaluation.set_metrics import NEIGHBOUR, Extractor, compare_sets
from featinv.evaluation.summary import summarize
from featinv.evaluation.tables import format_interval
from featinv.evaluation.witnesses import load_witnesses
from featinv.metrics import calibration_ratio
from featinv.models.base import Inverter
from featinv.utils.devices import timed
from featinv.utils.distributed import gather_objects, rank_and_world, share_rows
from featinv.utils.errors import InputError, at_least, unknown
from featinv.utils.files import write_text
from featinv.utils.pixels import from_uint8, to_uint8
from featinv.utils.precision import PRECISIONS, resolve_precision

ABOUT = ["key", "photograph", "label"]  # columns of `per_image` other than scores


class Evaluator:
    """Reconstructs a set of images and scores the reconstructions.

    All images are rounded to 8 bits before they are scored. "Another image" is one of another class
    (see `Pairing`). As a set, reconstructions are represented by the first sample of each image. No
    number depends on the batch size.

    Ranks share the sampling, which takes nearly all the time. Each must be given the same images,
    and ends up with all scores.

    `metrics()`, the contents of `metrics.json`, holds

    - `rows`: row -> metric -> `mean`, and `low` and `high` of its 95% interval, for the rows of
      `featinv.evaluation.report.ROWS`. In the inverted backbone, compared with the original:
      `spatial_cosine`, `normalised_cosine`, `pooled_cosine`, `relative_l2`, `top1_agreement`,
      `top5_agreement`. Compared with the original at the model's resolution: `NAME_cosine` and
      `NAME_top1` for each witness, `psnr`, `contrast` and `lpips`. Without comparison: `saturated`.
      For several samples: `diversity`, the mean of `metrics.pixel_spread`; `between_samples` and
      `to_original`, RMS distances in 0..1 pixel units; and `calibration_ratio`, their ratio.
      Entries that are 0 or 1 by definition are left out.
    - `sets`: witness or extractor -> row -> `kid`, `precision`, `recall` and, for enough images,
      `fd`; see `compare_sets`.
    - `witnesses`: their names; tables show the first one.
    - `num_images`, `num_photographs` (the unit of resampling), `num_samples`, `seed`, `sampler`,
      `sampling` (the same in words), `precision` (as chosen by `auto`), `device`,
      `seconds_per_reconstruction`, `backbone`, `layer`, `conditioning`, and `same_class`, the
      number of images that were compared with one of their own class, as no other was at hand.

    Args:
        model: A trained model, in eval mode.
        num_samples: Reconstructions per image, over which scores are averaged.
        seed: Seed of the sampling noise.
        batch_size: Reconstructions drawn at once.
        num_pictures: Number of images in the figure, from the start of the set.
        sampler: Values that replace those of the model's sampler, e.g. `num_steps`.
        precision: Of sampling: `"32-true"`, `"bf16-mixed"`, or `"auto"` for the faster one on this
            device. Scores are always computed in float32.
        extractors: Names of `Extractor`s that compare sets, besides the witnesses.
        lpips: Whether to compare by LPIPS as well, which downloads weights.
        witnesses: Names of classifiers for `load_witnesses`.

    Raises:
        InputError: A value out of range, a model that cannot reconstruct, or unavailable weights.
    """

    def __init__(
        self,
        model: Inverter,
        num_samples: int = 4,
        seed: int = 0,
        batch_size: int = 32,
        num_pictures: int = 6,
        sampler: dict | None = None,
        precision: str = "auto",
        extractors: Sequence[str] = (),
        lpips: bool = False,
        witnesses: Sequence[str] = ("lite2", "lite1"),
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
        model.check_reconstructs(self.settings)
        self.witnesses = load_witnesses(witnesses, model)
        self._extractors = [Extractor(name) for name in extractors if name not in self.witnesses]
        self._scorer = Scorer(model, self.witnesses, lpips)
        self.seconds = 0.0  # spent on sampling and decoding
        self._images: dict[int, dict] = {}  # index -> `ABOUT` and scores
        self._pairing = Pairing()
        self._pooled: dict[str, dict[str, list[Tensor]]] = {}  # extractor -> row -> (B, d) each
        self._pictures: list[tuple] = []  # key, original, samples, cosines, calibration ratio
        self._metrics: dict | None = None

    @property
    def keys(self) -> list[str]:
        """Keys of the scored images."""
        return [image["key"] for image in self._images.values()]

    @torch.no_grad()
    def run(self, batches: Iterable[dict], total: int | None = None) -> None:
        """Reconstruct and score every image of a data loader.

        Args:
            batches: Batches of a data module of `featinv.data`. An optional entry `photograph`, a
                list of strings, tells which images are crops of the same photograph.
            total: Number of images, for the progress bar.

        Raises:
            InputError: There is no image.
        """
        # Not in __init__, since the model may have moved; rank 0 decides for all.
        precision = resolve_precision(self.precision, self.model.device)
        self.precision = gather_objects(precision)[0]
        silent = rank_and_world()[0] > 0
        try:
            with tqdm(total=total, unit="img", desc="evaluate", disable=silent) as bar:
                for batch in batches:
                    self._score(batch)
                    bar.update(len(batch["image"]))
        finally:  # if the data are broken, the scores so far can still be saved
            self._metrics = None
            self._compare_others(self._pairing.finish())
        if not self._images:
            raise InputError("There is no image to evaluate: the data set is empty.")

    def _score(self, batch: dict) -> None:
        """Score a batch, and pair its images with earlier ones."""
        images = from_uint8(batch["image"].to(self.model.device))
        full_size = self._scorer.outputs(images)
        samples = self._draw(full_size[INVERTED][0], batch["index"].tolist())
        scored = self._scorer.score(images, full_size, samples)
        self._keep_scores(batch, scored)
        self._keep_pooled(scored)
        self._keep_pictures(batch, samples, scored.scores["reconstruction"])
        self._pair(batch, scored)

    def _draw(self, features: Tensor, indices: list[int]) -> Tensor:
        """Return reconstructions (B, S, 3, h, w) in [-1, 1], rounded to 8-bit values."""

        def draw(rows: Sequence[int]) -> Tensor:
            samples = self.model.invert(
                features[rows],
                self.num_samples,
                seed=self.seed,
                indices=[indices[row] for row in rows],
                batch_size=self.batch_size,
                precision=self.precision,
                **self._options,
            )
            return to_uint8(samples)

        with timed(self.model.device) as spent:
            samples = share_rows(draw, len(features))
        self.seconds += spent.seconds
        return from_uint8(samples)

    def _keep_scores(self, batch: dict, scored: Scored) -> None:
        """Record the scores of each image, averaged over its samples."""
        columns = [batch["key"], _photographs(batch), batch["label"].tolist()]
        table = dict(zip(ABOUT, columns, strict=True)) | {
            f"{row}/{metric}": value.mean(1).tolist()
            for row, scores in scored.scores.items()
            for metric, value in scores.items()
        }
        for i, index in enumerate(batch["index"].tolist()):
            self._images[index] = {name: values[i] for name, values in table.items()}

    def _pair(self, batch: dict, scored: Scored) -> None:
        """Compare images with others of another class, as soon as these are there."""
        photographs = _photographs(batch)
        for i, index in enumerate(batch["index"].tolist()):
            own = rows_of(scored.original, slice(i, i + 1))
            samples = rows_of(
                scored.samples, slice(i * self.num_samples, (i + 1) * self.num_samples)
            )
            item = Item(index, int(batch["label"][i]), photographs[i], own, samples)
            self._compare_others(self._pairing.add(item))

    def _compare_others(self, pairs: list[tuple[Item, Item]]) -> None:
        for item, other in pairs:
            for row, outputs in {"shuffled": other.samples, "floor": other.own}.items():
                for metric, value in compare(item.own, outputs).items():
                    self._images[item.index][f"{row}/{metric}"] = float(value.mean())

    def _keep_pooled(self, scored: Scored) -> None:
        """Keep the pooled features in which sets are compared."""
        for row, images in scored.images.items():
            pooled = {
                name: scored.outputs[row][name][0].mean(dim=(2, 3)) for name in self.witnesses
            }
            pooled |= {extractor.name: extractor(images) for extractor in self._extractors}
            for name, values in pooled.items():
                self._pooled.setdefault(name, {}).setdefault(row, []).append(values.float().cpu())

    def _keep_pictures(self, batch: dict, samples: Tensor, scores: Scores) -> None:
        """Keep the first images for the figure."""
        for i in range(min(len(samples), self.num_pictures - len(self._pictures))):
            ratio = None
            if self.num_samples > 1:
                distances = (scores[name][i, 0] for name in ("between_samples", "to_original"))
                ratio = calibration_ratio(*map(float, distances))
            drawn, cosines = to_uint8(samples[i]).cpu(), scores["spatial_cosine"][i].cpu()
            self._pictures.append((batch["key"][i], batch["image"][i], drawn, cosines, ratio))

    def per_image(self) -> pd.DataFrame:
        """Return one row per image, by its index in the set; columns: `ABOUT` and `ROW/METRIC`."""
        return pd.DataFrame.from_dict(self._images, orient="index").sort_index()

    def metrics(self) -> dict:
        """Return all numbers of the evaluation, described in the class docstring."""
        if self._metrics is None:
            images = self.per_image()
            self._metrics = {
                "rows": summarize(images.drop(columns=ABOUT), images["photograph"]),
                "sets": self._distances(),
                "witnesses": list(self.witnesses),
                "num_images": len(images),
                "num_photographs": images["photograph"].nunique(),
                "num_samples": self.num_samples,
                "seed": self.seed,
                "sampler": asdict(self.settings),
                "sampling": self.settings.describe(),
                "precision": self.precision,
                "device": str(self.model.device),
                "seconds_per_reconstruction": self.seconds / (len(images) * self.num_samples),
                "backbone": self.model.backbone.name,
                "layer": self.model.backbone.layer,
                "conditioning": self.model.conditioning,
                "same_class": self._pairing.same_class,
            }
        return self._metrics

    def _distances(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return extractor -> row -> distances between its images and the originals as sets."""
        if len(self._images) <= NEIGHBOUR:
            return {}
        distances = {}
        for name, rows in self._pooled.items():
            sets = {row: torch.cat(parts) for row, parts in rows.items()}
            real = sets.pop("original")
            distances[name] = {row: compare_sets(real, fake) for row, fake in sets.items()}
        return distances

    def save(self, folder: str | Path, command: str, **about: object) -> None:
        """Write `metrics.json`, `table.md`, `per_image.csv` and `reconstructions.png`.

        Args:
            folder: Where to write.
            command: The command that made the numbers, recorded beside them.
            about: Further entries of `metrics.json`, e.g. the path of the checkpoint.
        """
        metrics = self.metrics() | {"command": command} | about
        texts = {
            "metrics.json": json.dumps(metrics, indent=2) + "\n",
            "table.md": f"{report.page(metrics)}\n\nMade by `{command}`.\n",
            "per_image.csv": self.per_image().to_csv(float_format="%.6f", index_label="index"),
        }
        for name, text in texts.items():
            write_text(Path(folder) / name, text)
        save_figure(self.figure(), Path(folder) / "reconstructions.png")

    def figure(self) -> Figure:
        """Return a figure of originals, samples and spread of the first images."""
        keys, originals, samples, cosines, ratios = zip(*self._pictures, strict=True)
        ratio = self.metrics()["rows"]["reconstruction"].get("calibration_ratio")
        return reconstruction_figure(
            *map(torch.stack, (originals, samples, cosines)),
            keys,
            f"{self.model.backbone.name}, layer {self.model.backbone.layer}, "
            f"{self.model.conditioning} features: originals and reconstructions",
            ratios,
            f"calibration {format_interval(**ratio, digits=2)}" if ratio else "",
        )


def _photographs(batch: dict) -> list[str]:
    """Return the photograph that each image of a batch shows."""
    return batch.get("photograph", batch["key"])
