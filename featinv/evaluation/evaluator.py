"""Evaluation: reconstruct held-out images and score them beside ceiling and floor."""

import json
import time
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
from featinv.evaluation.tables import format_interval, markdown_table
from featinv.evaluation.witnesses import load_witnesses
from featinv.metrics import calibration_ratio
from featinv.models.base import Inverter
from featinv.utils.devices import synchronize
from featinv.utils.distributed import gather_objects, rank_and_world, share_rows
from featinv.utils.errors import InputError, at_least, unknown
from featinv.utils.files import atomic_write
from featinv.utils.pixels import from_uint8, to_uint8
from featinv.utils.precision import PRECISIONS, resolve_precision

ABOUT = ["key", "photograph", "label"]  # columns of `per_image` that are no scores


class Evaluator:
    """Scores of reconstructions on a set of images.

    All images go through 8 bits before they are scored. "Another image" is one of another class,
    see `Pairing`; no number depends on the batch size. Sets of images are the originals and as many
    others: the first sample of each.

    Ranks share the drawing, which takes nearly all the time: each has to be given the same images,
    and each has all the scores in the end.

    Its result is `metrics()`, the contents of `metrics.json`:

    - `rows`: row -> metric -> `mean`, and `low` and `high` of the 95% interval. The rows are those
      of `featinv.evaluation.report.ROWS`. Metrics: `spatial_cosine`, `normalised_cosine`,
      `pooled_cosine`, `relative_l2`, `top1_agreement` and `top5_agreement` against the original in
      the inverted backbone; for each witness, here lite2, `lite2_cosine` and `lite2_top1` against
      the original at the model's resolution; `psnr`, `contrast` and `lpips` against the same;
      `saturated`. Of two or more samples also `diversity`, the mean of `metrics.pixel_spread`;
      `between_samples` and `to_original`, their root mean square distances in 0..1 pixel units; and
      `calibration_ratio`, the one over the other. What is 0 or 1 by definition is left out.
    - `sets`: witness or extractor -> row -> `kid`, `precision`, `recall`, and `fd` where there are
      enough images, see `compare_sets`.
    - `witnesses`: their names; the first one is what tables show.
    - `num_images`, `num_photographs` (which intervals resample), `num_samples`, `seed`, `sampler`,
      `sampling` (the same in words), `precision` (what `auto` chose), `device`,
      `seconds_per_reconstruction`, `backbone`, `layer`, `conditioning`; `same_class`: how many
      images were compared with another of their own class, for want of a second one.

    Args:
        model: A trained model, in eval mode.
        num_samples: Reconstructions of each image; its score is the mean over them.
        seed: Seed of the sampling noise.
        batch_size: Reconstructions drawn at once.
        num_pictures: How many images the figure shows, from the start of the set.
        sampler: Values that replace the model's own: `num_steps`, `guidance_scale`, `scheduler`.
        precision: `"32-true"` or `"bf16-mixed"` to draw in bfloat16, or `"auto"` for the faster one
            on this device; all scores are computed in float32.
        extractors: In whose features sets of images are compared beside the witnesses': names of
            `Extractor`.
        lpips: Whether images are also compared by LPIPS, which downloads its network's weights.
        witnesses: Classifiers that took no part in training or guidance: see `load_witnesses`.

    Raises:
        InputError: A value out of its range, a model without a condition, or weights of a witness,
            an extractor or LPIPS that are unavailable.
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
        if not model.reconstructs(self.settings):
            raise InputError(
                "The checkpoint is a prior, trained without a condition: it cannot reconstruct; "
                "expected one trained with conditioning=spatial or conditioning=pooled, or "
                "sampler.feature_guidance_scale above 0."
            )
        self.witnesses = load_witnesses(witnesses, model)
        self._extractors = [Extractor(name) for name in extractors if name not in self.witnesses]
        self._scorer = Scorer(model, self.witnesses, lpips)
        self.seconds = 0.0  # spent on sampling and decoding
        self._images: dict[int, dict] = {}  # number in the set -> what it is, and its scores
        self._pairing = Pairing()
        self._pooled: dict[str, dict[str, list[Tensor]]] = {}  # extractor -> row -> (B, d) each
        self._pictures: list[dict] = []
        self._metrics: dict | None = None

    @property
    def keys(self) -> list[str]:
        """Keys of the images that were scored."""
        return [image["key"] for image in self._images.values()]

    @torch.no_grad()
    def run(self, batches: Iterable[dict], total: int | None = None) -> None:
        """Reconstruct and score every image of a data loader.

        Args:
            batches: Batches of a data module of `featinv.data`. An entry `photograph`, a list of
                strings, says which images show the same photograph; without it each is of its own.
            total: Number of images, for the progress bar.

        Raises:
            InputError: There is no image.
        """
        # The model may have moved since it was given; ranks must not disagree about a near tie.
        precision = resolve_precision(self.precision, self.model.device)
        self.precision = gather_objects(precision)[0]
        silent = rank_and_world()[0] > 0
        try:
            with tqdm(total=total, unit="img", desc="evaluate", disable=silent) as bar:
                for batch in batches:
                    self._score(batch)
                    bar.update(len(batch["image"]))
        finally:  # what there is can be saved, even if the data turn out to be broken
            self._metrics = None
            self._compare_others(self._pairing.finish())
        if not self._images:
            raise InputError("There is no image to evaluate: the data set is empty.")

    def _score(self, batch: dict) -> None:
        """Score a batch against its own originals, and with what came before it."""
        images = from_uint8(batch["image"].to(self.model.device))
        whole = self._scorer.look(images)
        samples = self._draw(whole[INVERTED][0], batch["index"].tolist())
        scored = self._scorer.score(images, whole, samples)
        self._keep_scores(batch, scored)
        self._keep_pooled(scored)
        self._keep_pictures(batch, samples, scored.scores["reconstruction"])
        self._pair(batch, scored)

    def _draw(self, features: Tensor, indices: list[int]) -> Tensor:
        """Return reconstructions (B, S, 3, h, w) as they are scored and shown, in 8-bit values."""

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

        synchronize(self.model.device)
        start = time.perf_counter()
        samples = share_rows(draw, len(features))
        synchronize(self.model.device)
        self.seconds += time.perf_counter() - start
        return from_uint8(samples)

    def _keep_scores(self, batch: dict, scored: Scored) -> None:
        """Record what the images are, and their scores averaged over the samples."""
        means = {
            f"{row}/{metric}": value.mean(1).tolist()
            for row, scores in scored.scores.items()
            for metric, value in scores.items()
        }
        about = zip(batch["key"], _photographs(batch), batch["label"].tolist(), strict=True)
        for i, (index, what) in enumerate(zip(batch["index"].tolist(), about, strict=True)):
            scores = {name: values[i] for name, values in means.items()}
            self._images[index] = dict(zip(ABOUT, what, strict=True)) | scores

    def _pair(self, batch: dict, scored: Scored) -> None:
        """Compare images with others, as soon as there are some of another class."""
        photographs = _photographs(batch)
        for i, index in enumerate(batch["index"].tolist()):
            own = rows_of(scored.original, slice(i, i + 1))
            drawn = rows_of(scored.drawn, slice(i * self.num_samples, (i + 1) * self.num_samples))
            item = Item(index, int(batch["label"][i]), photographs[i], own, drawn)
            self._compare_others(self._pairing.add(item))

    def _compare_others(self, pairs: list[tuple[Item, Item]]) -> None:
        for item, other in pairs:
            for row, view in {"shuffled": other.drawn, "floor": other.own}.items():
                for metric, value in compare(item.own, view).items():
                    self._images[item.index][f"{row}/{metric}"] = float(value.mean())

    def _keep_pooled(self, scored: Scored) -> None:
        """Keep what sets of images are compared by."""
        for row, images in scored.images.items():
            pooled = {name: scored.views[row][name][0].mean(dim=(2, 3)) for name in self.witnesses}
            pooled |= {extractor.name: extractor(images) for extractor in self._extractors}
            for name, values in pooled.items():
                self._pooled.setdefault(name, {}).setdefault(row, []).append(values.float().cpu())

    def _keep_pictures(self, batch: dict, samples: Tensor, scores: Scores) -> None:
        """Keep what the figure shows: several samples have a spread, and a calibration ratio."""
        for i in range(min(len(samples), self.num_pictures - len(self._pictures))):
            picture = {
                "captions": batch["key"][i],
                "originals": batch["image"][i],
                "samples": to_uint8(samples[i]).cpu(),
                "scores": scores["spatial_cosine"][i].cpu(),
            }
            if self.num_samples > 1:
                distances = (scores[name][i, 0] for name in ("between_samples", "to_original"))
                picture["ratios"] = calibration_ratio(*map(float, distances))
            self._pictures.append(picture)

    def per_image(self) -> pd.DataFrame:
        """Return a row for each image, in the order of the set, and a column for each score.

        The index is the image's number in the set; the columns are `ABOUT` and `ROW/METRIC`.
        """
        return pd.DataFrame.from_dict(self._images, orient="index").sort_index()

    def metrics(self) -> dict:
        """Return all numbers of the evaluation, see the class; computed once for all images."""
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
        """Return extractor -> row -> how far its images are, as a set, from the originals."""
        if len(self._images) <= NEIGHBOUR:
            return {}
        distances = {}
        for name, rows in self._pooled.items():
            sets = {row: torch.cat(parts) for row, parts in rows.items()}
            real = sets.pop("original")
            distances[name] = {row: compare_sets(real, fake) for row, fake in sets.items()}
        return distances

    def table_rows(self) -> list[dict[str, str]]:
        """Return the rows of the table, as text: see `report.table_rows`."""
        return report.table_rows(self.metrics())

    def caption(self) -> str:
        """Return what the numbers are, in a few sentences."""
        return report.caption(self.metrics())

    def save(self, folder: str | Path, command: str, **about: object) -> None:
        """Write `metrics.json`, `table.md`, `per_image.csv` and `reconstructions.png`.

        Args:
            folder: Where to.
            command: What was typed to get here, to stand beside the numbers.
            about: Further entries of `metrics.json`, e.g. the checkpoint's path.
        """
        metrics = self.metrics() | {"command": command} | about
        table = markdown_table(self.table_rows())
        csv = self.per_image().to_csv(float_format="%.6f", index_label="index")
        texts = {
            "metrics.json": json.dumps(metrics, indent=2) + "\n",
            "table.md": f"{table}\n{self.caption()}\n\nMade by `{command}`.\n",
            "per_image.csv": csv,
        }
        for name, text in texts.items():
            with atomic_write(Path(folder) / name) as file:
                file.write(text.encode())
        save_figure(self.figure(), Path(folder) / "reconstructions.png")

    def figure(self) -> Figure:
        """Return the figure: original, samples and spread of the first images."""
        parts = {name: [p[name] for p in self._pictures] for name in self._pictures[0]}
        about = {name: parts.pop(name) for name in ("captions", "ratios") if name in parts}
        if ratio := self.metrics()["rows"]["reconstruction"].get("calibration_ratio"):
            about["spread_title"] = f"spread, calibration {format_interval(**ratio, digits=2)}"
        return reconstruction_figure(
            **{name: torch.stack(values) for name, values in parts.items()},
            **about,
            title=f"{self.model.backbone.name}, layer {self.model.backbone.layer}, "
            f"{self.model.conditioning} features: originals and reconstructions",
        )


def _photographs(batch: dict) -> list[str]:
    """Return which photograph each image of a batch shows."""
    return batch.get("photograph", batch["key"])
