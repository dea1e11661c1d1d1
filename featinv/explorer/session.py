"""Session: what a run of the explorer draws, and what repeats it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from timm.data import ImageNetInfo
from torch import Tensor, nn

from featinv.analysis.concepts import Concepts
from featinv.analysis.edits import mix, steer
from featinv.analysis.probe import Probe
from featinv.checkpoints import find_checkpoint
from featinv.data.images import eval_view
from featinv.evaluation.figures import gallery_figure, heat_picture
from featinv.explorer.photos import Photo
from featinv.explorer.settings import Settings
from featinv.metrics import calibration_ratio, pixel_spread, sample_distances, spatial_cosine
from featinv.models.featinv import FeatInv
from featinv.utils.errors import InputError
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8

ROW = 5  # pictures in a row of the figure


class Reconstruction(NamedTuple):
    """One sample: `image` (uint8, (3, H, W)) and how the backbone sees it.

    `cosine` is the spatial cosine between its features and the condition, in [-1, 1]; `label` the
    predicted class and `probability` that of the class, in [0, 1], or None without classes.
    """

    image: Tensor
    cosine: float
    label: str | None
    probability: float | None

    @property
    def caption(self) -> str:
        """All of that in words."""
        text = f"cosine {self.cosine:.3f}"
        return text if self.label is None else f"{text}; {self.label} {self.probability:.0%}"


class Spread(NamedTuple):
    """How samples differ: a map of it, `image` (uint8, (3, H, W)), and how much, in words."""

    image: np.ndarray
    caption: str


@dataclass(frozen=True)
class Exploration:
    """A model, and perhaps concepts of its features, to explore photographs with.

    Args:
        model: Draws; in eval mode.
        concepts: Of one of the layers that the model inverts.
        hashes: SHA-256 of the files, by `"checkpoint"`, `"concepts"` and `"probe"`.
    """

    model: FeatInv
    concepts: Concepts | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    # A stopped run finishes its sample while the next one begins: one at a time, or each would
    # count the other's steps.
    lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    @staticmethod
    def load(
        checkpoint: str, concepts: str | None, device: torch.device, probe: str | None = None
    ) -> "Exploration":
        """Read the files.

        Args:
            checkpoint: As for `FeatInv.load`.
            concepts: A file that `Concepts.save` wrote, or `None`.
            device: Where to draw.
            probe: A file that `Probe.save` wrote, to classify by, or `None`.

        Raises:
            InputError: A file cannot be read, or they do not fit each other.
        """
        model = FeatInv.load(checkpoint).to(device)
        files = {"checkpoint": find_checkpoint(checkpoint)}
        found = None
        if concepts is not None:
            files["concepts"], found = Path(concepts), Concepts.load(concepts)
            layers = [f"{model.backbone.name} {layer}" for layer in model.backbone.layers]
            if found.layer not in ("", *layers):
                raise InputError(
                    f"The concepts '{concepts}' are of {found.layer}, expected those of "
                    f"{' or '.join(layers)}, which '{checkpoint}' inverts."
                )
        if probe is not None:
            files["probe"] = Path(probe)
            Probe.load(probe).attach(model.backbone)
        hashes = {key: hashlib.sha256(f.read_bytes()).hexdigest() for key, f in files.items()}
        return Exploration(model, found, hashes)

    @torch.no_grad()
    def condition(self, photos: Sequence[Photo], settings: Settings) -> Tensor:
        """Return the features to invert: those of the photographs, mixed, then steered.

        Args:
            photos: One or two.
            settings: Layer, weight and path of the mixture, and the concepts' factors.

        Returns:
            Shape (1, C, h, w).

        Raises:
            InputError: An unknown layer, path or concept, or concepts of another layer.
        """
        images = torch.stack([self.view(photo) for photo in photos]).to(self.model.device)
        features = self.model.backbone.features(from_uint8(images), settings.layer)
        if len(photos) == 2:
            features = mix(features[:1], features[1:], settings.weight, settings.path)
        return self._steer(features, settings) if settings.factors else features

    def _steer(self, features: Tensor, settings: Settings) -> Tensor:
        backbone = self.model.backbone
        layer = f"{backbone.name} {settings.layer or backbone.layer}"
        if self.concepts is not None and self.concepts.layer not in ("", layer):
            raise InputError(
                f"The concepts are of {self.concepts.layer}, but the chosen layer is {layer}: "
                "expected that of the concepts, or none to steer."
            )
        number = 0 if self.concepts is None else len(self.concepts)
        if unknown := sorted(set(settings.factors) - set(range(number))):
            expected = f"0 to {number - 1}" if number else "concepts=FILE at the start"
            raise InputError(f"There is no concept {unknown[0]}: expected {expected}.")
        # All presences are read before the first change, so the order of changes is irrelevant.
        presence = self.concepts.presence(features)  # (1, K, h, w)
        directions = self.concepts.directions.to(features)
        for concept, factor in settings.factors.items():
            features = steer(features, presence[:, concept], directions[concept], factor)
        return features

    def draw(
        self,
        condition: Tensor,
        settings: Settings,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Iterator[Reconstruction]:
        """Draw the samples one by one, each when it is asked for.

        They are those of `model.invert(condition, num_samples, layer=layer, seed=seed,
        batch_size=1, precision=precision, **sampler)`.

        Args:
            condition: From `condition`.
            settings: Layer, seed, number of samples, sampler and precision.
            on_step: Called with the number of each denoising step, from 1 over all samples.

        Raises:
            InputError: A value that the sampler refuses, or nothing that would see the features.
        """
        sampler = self.model.settings(**settings.sampler)
        if not self.model.reconstructs(sampler):
            raise InputError(
                "The model has no ControlNet, so nothing of what it draws depends on the image: "
                "expected a feature guidance scale above 0, for example 10."
            )
        steps = count(1)
        for s in range(settings.num_samples):
            with self.lock, _count_steps(self.model.unet, lambda: on_step(next(steps))):
                images = self.model.invert(
                    condition,
                    layer=settings.layer,
                    seed=settings.seed,
                    first_sample=s,
                    precision=settings.precision,
                    **settings.sampler,
                )
            yield self._compare(images[0], condition, settings.layer)

    @torch.no_grad()
    def _compare(self, image: Tensor, condition: Tensor, layer: str | None) -> Reconstruction:
        """Return an image (1, 3, H, W) with its cosine and its class."""
        features, logits = self.model.backbone.features_and_logits(eight_bit(image), layer)
        label = probability = None
        if logits is not None:
            best, number = logits.softmax(1)[0].max(0)
            label, probability = class_name(int(number), logits.shape[1]), float(best)
        cosine = float(spatial_cosine(condition, features))
        return Reconstruction(to_uint8(image[0]).cpu(), cosine, label, probability)

    def view(self, photo: Photo) -> Tensor:
        """Return what the model sees of a photograph, the central square: uint8, (3, S, S)."""
        return eval_view(photo.picture, max(self.model.image_size, self.model.backbone.image_size))

    def spread(
        self, photos: Sequence[Photo], settings: Settings, drawn: Sequence[Reconstruction]
    ) -> Spread | None:
        """Return how the samples differ, `None` of fewer than two.

        With it goes the calibration ratio, but not of features that were mixed or steered: no
        photograph has them.
        """
        if len(drawn) < 2:
            return None
        samples = from_uint8(torch.stack([sample.image for sample in drawn]))[None]
        spread = pixel_spread(samples)[0]
        caption = f"spread {float(spread.mean()):.3f}"
        if len(photos) == 1 and all(factor == 1 for factor in settings.factors.values()):
            original = from_uint8(self._drawable(photos[0]))[None]
            ratio = calibration_ratio(*map(float, sample_distances(samples, original)))
            caption += f", calibration {ratio:.2f}"
        return Spread(heat_picture(spread), caption)

    def _drawable(self, photo: Photo) -> Tensor:
        """Return a photograph at the model's resolution: uint8, (3, H, W)."""
        return to_uint8(resize(from_uint8(self.view(photo))[None], self.model.image_size))[0]

    def figure(
        self, photos: Sequence[Photo], settings: Settings, drawn: Sequence[Reconstruction]
    ) -> Figure:
        """Lay out what the model saw, and below it what it drew, and how that differs."""
        cells = [(sample.image, f"cosine {sample.cosine:.3f}") for sample in drawn]
        if spread := self.spread(photos, settings, drawn):
            cells.append(spread)
        seen = zip(map(self._drawable, photos), ("image", "second image"), strict=False)
        rows = [list(seen), *(cells[i : i + ROW] for i in range(0, len(cells), ROW))]
        pictures, captions = ([[cell[k] for cell in row] for row in rows] for k in (0, 1))
        return gallery_figure(pictures, captions=captions)

    def record(self, settings: Settings, photos: Sequence[Photo]) -> str:
        """Return the JSON that `read` takes: every value of a run, and the hashes of its inputs."""
        values = asdict(settings)
        values["layer"] = settings.layer or self.model.backbone.layer
        values["sampler"] = asdict(self.model.settings(**settings.sampler))
        values["sha256"] = self._input_hashes(photos)
        return json.dumps(values, indent=2) + "\n"

    def read(self, path: str | Path, photos: Sequence[Photo]) -> Settings:
        """Return the settings of an earlier run.

        Args:
            path: A file with what `record` returned.
            photos: Those of that run.

        Raises:
            InputError: Not such a file; or its model, concepts or photographs were others.
        """
        try:
            values = json.loads(Path(path).read_text())
            recorded = dict(values.pop("sha256"))
            factors = {int(concept): factor for concept, factor in values.pop("factors").items()}
            settings = Settings(**values, factors=factors)
            self.model.settings(**settings.sampler)
        except FileNotFoundError:
            raise InputError(
                f"There is no file '{path}': expected settings that the explorer's page gave."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"The settings '{path}' cannot be read ({type(error).__name__}: {error}); expected "
                "a file that the explorer's page gave."
            ) from error
        found = self._input_hashes(photos)
        for key in sorted(recorded.keys() | found.keys()):
            if recorded.get(key) != found.get(key):
                raise InputError(
                    f"The settings '{path}' were made with another '{key}': expected SHA-256 "
                    f"{recorded.get(key, 'none')[:12]}, found {found.get(key, 'none')[:12]}."
                )
        return settings

    def _input_hashes(self, photos: Sequence[Photo]) -> dict[str, str]:
        names = ("image", "second")
        return self.hashes | {k: photo.sha256 for k, photo in zip(names, photos, strict=False)}


@contextmanager
def _count_steps(unet: nn.Module, on_step: Callable[[], None]) -> Iterator[None]:
    """Call a function in every denoising step, however often guidance runs the UNet in it."""
    last = None

    def forward_hook(_: nn.Module, inputs: tuple, __: object) -> None:
        nonlocal last
        timestep = int(inputs[1][0])
        if timestep != last:
            last = timestep
            on_step()

    handle = unet.register_forward_hook(forward_hook)
    try:
        yield
    finally:
        handle.remove()


def class_name(label: int, num_classes: int) -> str:
    """Return the name of an ImageNet class, or the number of another."""
    if num_classes != 1000:
        return f"class {label}"
    return ImageNetInfo().index_to_description(label).split(",")[0]
