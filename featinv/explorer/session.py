"""Draw reconstructions for the explorer, and record the settings that reproduce them."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
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
from featinv.analysis.edits import mix
from featinv.analysis.probe import Probe
from featinv.checkpoints import find_checkpoint
from featinv.data.images import eval_view
from featinv.evaluation.figures import gallery_figure, heat_picture
from featinv.explorer.inputs import Photo, Settings
from featinv.metrics import calibration_ratio, pixel_spread, sample_distances, spatial_cosine
from featinv.models.featinv import FeatInv
from featinv.utils.errors import InputError
from featinv.utils.files import sha256
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8

ROW = 5  # pictures in a row of the figure


class Reconstruction(NamedTuple):
    """A sample, and what the backbone sees in it."""

    image: Tensor  # uint8, (3, H, W)
    cosine: float  # spatial cosine between its features and the condition
    label: str | None  # predicted class; `None` without classes
    probability: float | None  # of that class

    @property
    def caption(self) -> str:
        """Cosine, and class with its probability, as text."""
        text = f"cosine {self.cosine:.3f}"
        return text if self.label is None else f"{text}; {self.label} {self.probability:.0%}"


class Spread(NamedTuple):
    """How samples differ."""

    image: np.ndarray  # heat map, uint8, (3, H, W)
    caption: str


@dataclass(frozen=True)
class Exploration:
    """A model, and optionally concepts of its features, to explore photographs with.

    Args:
        model: The model, in eval mode.
        concepts: Concepts of a layer that the model inverts.
        hashes: SHA-256 of the files `"checkpoint"`, `"concepts"` and `"probe"`.
    """

    model: FeatInv
    concepts: Concepts | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    # One sample at a time: a stopped run finishes its sample while the next run begins, and each
    # would count the steps of the other.
    lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    @staticmethod
    def load(
        checkpoint: str, concepts: str | None, device: torch.device, probe: str | None = None
    ) -> "Exploration":
        """Read the files.

        Args:
            checkpoint: As for `FeatInv.load`.
            concepts: A file that `Concepts.save` wrote.
            device: Device of the model.
            probe: A file that `Probe.save` wrote, whose classes replace those of the backbone.

        Raises:
            InputError: A file cannot be read, or the files do not belong together.
        """
        model = FeatInv.load(checkpoint).to(device)
        files = {"checkpoint": find_checkpoint(checkpoint)}
        found = None
        if concepts is not None:
            files["concepts"], found = Path(concepts), Concepts.load(concepts)
            layers = [f"{model.backbone.name} {layer}" for layer in model.backbone.layers]
            if found.layer not in ("", *layers):
                raise InputError(
                    f"The concepts '{concepts}' are of {found.layer}, expected concepts of "
                    f"{' or '.join(layers)}, which '{checkpoint}' inverts."
                )
        if probe is not None:
            files["probe"] = Path(probe)
            Probe.load(probe).attach(model.backbone)
        return Exploration(model, found, {key: sha256(file) for key, file in files.items()})

    @torch.no_grad()
    def condition(self, photos: Sequence[Photo], settings: Settings) -> Tensor:
        """Return the features to invert (1, C, h, w): those of the photographs, mixed and steered.

        Args:
            photos: One photograph, or two to mix.
            settings: Layer, weight and path of the mixture, and factors of the concepts.

        Raises:
            InputError: An unknown layer, path or concept, or concepts of another layer.
        """
        images = torch.stack([self.view(photo) for photo in photos]).to(self.model.device)
        features = self.model.backbone.features(from_uint8(images), settings.layer)
        if len(photos) == 2:
            features = mix(features[:1], features[1:], settings.weight, settings.path)
        return self._steer(features, settings) if settings.factors else features

    def _steer(self, features: Tensor, settings: Settings) -> Tensor:
        if self.concepts is None:
            raise InputError("There are no concepts to steer: expected concepts=FILE.")
        backbone = self.model.backbone
        layer = f"{backbone.name} {settings.layer or backbone.layer}"
        if self.concepts.layer not in ("", layer):
            raise InputError(
                f"The concepts are of {self.concepts.layer}, but the chosen layer is {layer}: "
                "expected the layer of the concepts, or no concept to steer."
            )
        return self.concepts.steer(features, settings.factors)

    def draw(
        self,
        condition: Tensor,
        settings: Settings,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Iterator[Reconstruction]:
        """Draw the samples lazily, one by one.

        They equal those of `model.invert(condition, num_samples, layer=layer, seed=seed,
        batch_size=1, precision=precision, **sampler)`.

        Args:
            condition: From `condition`.
            settings: Layer, seed, number of samples, sampler and precision.
            on_step: Called with the number of each denoising step, counted from 1 over all samples.

        Raises:
            InputError: A bad value of the sampler, or a model that would ignore the features.
        """
        sampler = self.model.settings(**settings.sampler)
        self.model.check_reconstructs(sampler)
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
        """Return the central square of a photograph, which the model sees: uint8, (3, S, S)."""
        return eval_view(photo.picture, max(self.model.image_size, self.model.backbone.image_size))

    def spread(
        self, photos: Sequence[Photo], settings: Settings, drawn: Sequence[Reconstruction]
    ) -> Spread | None:
        """Return how the samples differ; `None` for fewer than two.

        The caption has the calibration ratio, unless features were mixed or steered: then there is
        no original to compare with.
        """
        if len(drawn) < 2:
            return None
        samples = from_uint8(torch.stack([sample.image for sample in drawn]))[None]
        spread = pixel_spread(samples)[0]
        caption = f"spread {float(spread.mean()):.3f}"
        if len(photos) == 1 and all(factor == 1 for factor in settings.factors.values()):
            original = from_uint8(self._at_model_size(photos[0]))[None]
            ratio = calibration_ratio(*map(float, sample_distances(samples, original)))
            caption += f", calibration {ratio:.2f}"
        return Spread(heat_picture(spread), caption)

    def _at_model_size(self, photo: Photo) -> Tensor:
        """Return a photograph at the model's resolution: uint8, (3, H, W)."""
        return to_uint8(resize(from_uint8(self.view(photo))[None], self.model.image_size))[0]

    def figure(
        self, photos: Sequence[Photo], settings: Settings, drawn: Sequence[Reconstruction]
    ) -> Figure:
        """Show what the model saw, and below it what it drew and how the samples differ."""
        cells = [(sample.image, f"cosine {sample.cosine:.3f}") for sample in drawn]
        if spread := self.spread(photos, settings, drawn):
            cells.append(spread)
        seen = zip(map(self._at_model_size, photos), ("image", "second image"), strict=False)
        rows = [list(seen), *(cells[i : i + ROW] for i in range(0, len(cells), ROW))]
        pictures, captions = ([[cell[k] for cell in row] for row in rows] for k in (0, 1))
        return gallery_figure(pictures, captions=captions)

    def record(self, settings: Settings, photos: Sequence[Photo]) -> str:
        """Return all values of a run and the hashes of its inputs, as JSON for `read`."""
        values = asdict(settings)
        values["layer"] = settings.layer or self.model.backbone.layer
        values["sampler"] = asdict(self.model.settings(**settings.sampler))
        values["sha256"] = self._input_hashes(photos)
        return json.dumps(values, indent=2) + "\n"

    def read(self, path: str | Path, photos: Sequence[Photo]) -> Settings:
        """Read the settings of an earlier run.

        Args:
            path: A file with the result of `record`.
            photos: The photographs of that run.

        Raises:
            InputError: The file cannot be read, or that run had another model, concepts, probe or
                photographs.
        """
        try:
            values = json.loads(Path(path).read_text())
            recorded = dict(values.pop("sha256"))
            factors = {int(concept): factor for concept, factor in values.pop("factors").items()}
            settings = Settings(**values, factors=factors)
            self.model.settings(**settings.sampler)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"The settings '{path}' cannot be read ({type(error).__name__}: {error}); expected "
                "a file from the explorer's page."
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
    """Call a function once per denoising step, however often guidance runs the UNet in it."""
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
    """Return the name of a class for ImageNet's label space, else its number."""
    if num_classes != 1000:
        return f"class {label}"
    return _imagenet().index_to_description(label).split(",")[0]


_imagenet = cache(ImageNetInfo)  # reads files
