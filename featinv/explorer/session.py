"""Exploration: what one run of the explorer draws, and the settings that repeat it."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo
from torch import Tensor

from featinv.analysis.concepts import Concepts
from featinv.analysis.edits import mix, steer
from featinv.checkpoints import find_checkpoint, load_model
from featinv.data.images import decode, eval_view
from featinv.data.photographs import HELD_OUT, load
from featinv.evaluation.figures import gallery_figure
from featinv.metrics import spatial_cosine
from featinv.models.featinv import FeatInv
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no format that starts other programs
MAX_SAMPLES = 16
MAX_FACTOR = 2.0
ROW = 4  # pictures in a row of the figure


@dataclass(frozen=True)
class Settings:
    """All that a run depends on beside its model, concepts and images.

    Args:
        seed: Seed of the noise.
        num_samples: Reconstructions, 1 to `MAX_SAMPLES`.
        sampler: Values that replace those of the model's sampler, by their names.
        factors: Of concepts, by their numbers, in [0, `MAX_FACTOR`]; 0 removes one, 1 changes
            nothing.
        weight: Where between two images, in [0, 1]: 0 is the first. Of one image it means nothing.
        path: How features are mixed, see `featinv.analysis.edits.mix`.

    Raises:
        InputError: A value out of its range.
    """

    seed: int = 0
    num_samples: int = 4
    sampler: dict[str, object] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)
    weight: float = 0.5
    path: str = "linear"

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        if at_least("num_samples", self.num_samples, 1) > MAX_SAMPLES:
            raise InputError(
                f"num_samples is {self.num_samples}, expected 1 to {MAX_SAMPLES}, the nearest "
                f"valid choice is {MAX_SAMPLES}."
            )
        if not 0 <= self.weight <= 1:
            raise InputError(f"The weight of the second image is {self.weight}, expected 0 to 1.")
        for concept, factor in self.factors.items():
            if not 0 <= factor <= MAX_FACTOR:
                raise InputError(
                    f"The factor of concept {concept} is {factor}, expected 0 to {MAX_FACTOR:g}."
                )


class Photo(NamedTuple):
    """A photograph to invert: its file's name, the decoded picture (RGB) and what tells it apart.

    The hash is of the pixels, so it is the same for every lossless copy of the file.
    """

    name: str
    picture: Image.Image
    sha256: str


class Reconstruction(NamedTuple):
    """One sample: `image` (uint8, (3, H, W)) and what the classifier says of it.

    `cosine` is the spatial cosine to the features that were asked for, in [-1, 1]; `label` the
    class that the classifier sees, `probability` in [0, 1] how sure it is.
    """

    image: Tensor
    cosine: float
    label: str
    probability: float

    @property
    def caption(self) -> str:
        """All of that in words."""
        return f"cosine {self.cosine:.3f}; {self.label} {self.probability:.0%}"


@dataclass(frozen=True)
class Exploration:
    """A model, and perhaps concepts of its features, to explore photographs with.

    Args:
        model: Draws; in eval mode.
        concepts: Of the layer that the model inverts.
        hashes: SHA-256 of the files of both, by `"checkpoint"` and `"concepts"`.
    """

    model: FeatInv
    concepts: Concepts | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    # A run that was stopped still draws its sample while the next one begins: one at a time, or
    # they would count each other's steps.
    lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    @staticmethod
    def load(checkpoint: str, concepts: str | None, device: torch.device) -> "Exploration":
        """Read the files.

        Args:
            checkpoint: As for `featinv.checkpoints.load_model`.
            concepts: A file that `Concepts.save` wrote, or `None`.
            device: Where to draw.

        Raises:
            InputError: A file cannot be read, or they do not fit each other.
        """
        model = load_model(checkpoint).to(device)
        if not isinstance(model, FeatInv):
            raise InputError(
                f"The checkpoint '{checkpoint}' is a {type(model).__name__}, which has no sampler "
                "to explore: expected a FeatInv, for example imagenette-small."
            )
        files = {"checkpoint": find_checkpoint(checkpoint)}
        found = None
        if concepts is not None:
            files["concepts"], found = Path(concepts), Concepts.load(concepts)
            layer = f"{model.backbone.name} {model.backbone.layer}"
            if found.layer not in ("", layer):
                raise InputError(
                    f"The concepts '{concepts}' are of {found.layer}, expected those of {layer}, "
                    f"which '{checkpoint}' inverts."
                )
        hashes = {key: hashlib.sha256(f.read_bytes()).hexdigest() for key, f in files.items()}
        return Exploration(model, found, hashes)

    @torch.no_grad()
    def ask(self, photos: Sequence[Photo], settings: Settings) -> Tensor:
        """Return the features to invert: those of the photographs, mixed, then steered.

        Args:
            photos: One or two.
            settings: Weight and path of the mixture, and the concepts' factors.

        Returns:
            Shape (1, C, h, w).

        Raises:
            InputError: An unknown path or concept.
        """
        images = torch.stack([self.view(photo) for photo in photos]).to(self.model.device)
        features = self.model.backbone.features(from_uint8(images))
        if len(photos) == 2:
            features = mix(features[:1], features[1:], settings.weight, settings.path)
        if not settings.factors:
            return features
        number = 0 if self.concepts is None else len(self.concepts)
        if unknown := sorted(set(settings.factors) - set(range(number))):
            there = f"0 to {number - 1}" if number else "concepts=FILE at the start"
            raise InputError(f"There is no concept {unknown[0]}: expected {there}.")
        # All presences are read before the first change, so the order of changes means nothing.
        presence = self.concepts.presence(features)  # (1, K, h, w)
        directions = self.concepts.directions.to(features)
        for concept, factor in settings.factors.items():
            features = steer(features, presence[:, concept], directions[concept], factor)
        return features

    def draw(
        self, asked: Tensor, settings: Settings, tell: Callable[[int], None] = lambda step: None
    ) -> Iterator[Reconstruction]:
        """Draw the samples one by one, each as soon as it is wanted.

        They are those of `model.invert(asked, num_samples, seed=seed, batch_size=1, **sampler)`.

        Args:
            asked: From `ask`.
            settings: Seed, number of samples and sampler.
            tell: Is told the number of each denoising step, counted from 1 over all samples.

        Raises:
            InputError: A value that the sampler refuses, or nothing that would see the features.
        """
        sampler = self.model.settings(**settings.sampler)
        if not self.model.reconstructs(sampler):
            raise InputError(
                "The model has no ControlNet, so nothing of what it draws depends on the image: "
                "expected a feature guidance scale above 0, for example 0.05."
            )
        done = count(1)
        for s in range(settings.num_samples):
            with self.lock, _steps_told(self.model, lambda: tell(next(done))):
                drawn = self.model.invert(
                    asked, seed=settings.seed, first_sample=s, **settings.sampler
                )
            yield self._extracted(drawn[0], asked)

    @torch.no_grad()
    def _extracted(self, drawn: Tensor, asked: Tensor) -> Reconstruction:
        """Return an image (1, 3, H, W) with what the classifier says of it."""
        features, logits = self.model.backbone.features_and_logits(eight_bit(drawn))
        probability, label = logits.softmax(1)[0].max(0)
        cosine = spatial_cosine(asked, features)
        name = class_name(int(label), logits.shape[1])
        return Reconstruction(to_uint8(drawn[0]).cpu(), float(cosine), name, float(probability))

    def view(self, photo: Photo) -> Tensor:
        """Return what the model sees of a photograph, the central square: uint8, (3, S, S)."""
        return eval_view(photo.picture, max(self.model.image_size, self.model.backbone.image_size))

    def figure(self, photos: Sequence[Photo], drawn: Sequence[Reconstruction]) -> Figure:
        """Lay out what the model saw, and below it what it drew."""
        size = self.model.image_size
        seen = [to_uint8(resize(from_uint8(self.view(p))[None], size))[0] for p in photos]
        rows = [drawn[i : i + ROW] for i in range(0, len(drawn), ROW)]
        captions = [["image", "second image"][: len(photos)]]
        captions += [[f"cosine {sample.cosine:.3f}" for sample in row] for row in rows]
        return gallery_figure(
            [seen, *([sample.image for sample in row] for row in rows)],
            captions=captions,
        )

    def record(self, settings: Settings, photos: Sequence[Photo]) -> str:
        """Return the JSON that `read` takes: every value of the run, and what it stood on."""
        sampler = asdict(self.model.settings(**settings.sampler))
        values = asdict(settings) | {"sampler": sampler, "sha256": self._sources(photos)}
        return json.dumps(values, indent=2) + "\n"

    def read(self, path: str | Path, photos: Sequence[Photo]) -> Settings:
        """Return the settings of an earlier run.

        Args:
            path: A file with what `record` returned.
            photos: Those of that run.

        Raises:
            InputError: Not such a file; or model, concepts or photographs are others.
        """
        try:
            values = json.loads(Path(path).read_text())
            recorded = values.pop("sha256")
            factors = {int(concept): factor for concept, factor in values.pop("factors").items()}
            settings = Settings(**values, factors=factors)
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
        found = self._sources(photos)
        for key in sorted(recorded.keys() | found.keys()):
            if recorded.get(key) != found.get(key):
                raise InputError(
                    f"The {key} is another than that of '{path}': its SHA-256 begins with "
                    f"{found.get(key, 'nothing')[:12]}, expected "
                    f"{recorded.get(key, 'nothing')[:12]} (nothing: there was none)."
                )
        return settings

    def _sources(self, photos: Sequence[Photo]) -> dict[str, str]:
        """Return the hashes of all that a run stands on."""
        names = ("image", "second")
        return self.hashes | {k: photo.sha256 for k, photo in zip(names, photos, strict=False)}


@contextmanager
def _steps_told(model: FeatInv, tell: Callable[[], None]) -> Iterator[None]:
    """Call a function after every denoising step, which is a pass through the UNet."""
    hook = model.unet.register_forward_hook(lambda *_: tell())
    try:
        yield
    finally:
        hook.remove()


def read_photo(path: str | Path, name: str, max_megapixels: float) -> Photo:
    """Read a picture that somebody gave us, decoding it only if it is not too large.

    Args:
        path: The file.
        name: How its owner calls it.
        max_megapixels: Width times height at most, in millions.

    Raises:
        InputError: No picture of a kind in `FORMATS`, damaged, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are extracted here
            with Image.open(path, formats=FORMATS) as header:  # decodes nothing yet
                size = header.size
    except UnidentifiedImageError:
        raise InputError(
            f"'{name}' is not a picture that can be read: expected a "
            f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} file."
        ) from None
    except Image.DecompressionBombError:
        size = None
    if size is None or size[0] * size[1] > max_megapixels * 1e6:
        sides = f" ({size[0]} x {size[1]} pixels)" if size else ""
        raise InputError(
            f"'{name}' is too large{sides}: expected at most {max_megapixels:g} megapixels, "
            "make it smaller first."
        )
    return _photo(name, decode(path, name))


def class_name(label: int, num_classes: int) -> str:
    """Return what a class is called: ImageNet's by name, others by number."""
    if num_classes != 1000:
        return f"class {label}"
    return ImageNetInfo().index_to_description(label).split(",")[0]


def find_photo(path: str, max_megapixels: float) -> Photo:
    """Return a photograph by its path, or one of those that come along, by its file name.

    Raises:
        InputError: There is none, or see `read_photo`.
    """
    if Path(path).is_file():
        return read_photo(path, path, max_megapixels)
    if path in HELD_OUT:
        return _photo(path, load(path))
    raise InputError(
        f"There is no image '{path}': expected a file, or one of {', '.join(HELD_OUT)}."
    )


def _photo(name: str, picture: Image.Image) -> Photo:
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes())
    return Photo(name, picture, digest.hexdigest())
