"""Session: what a run of the explorer draws, and the settings that repeat it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from timm.data import ImageNetInfo
from torch import Tensor, nn

from featinv.analysis.concepts import Concepts
from featinv.analysis.edits import mix, steer
from featinv.analysis.probe import Probe
from featinv.checkpoints import find_checkpoint
from featinv.data.images import eval_view
from featinv.evaluation.figures import gallery_figure
from featinv.explorer.photos import Photo
from featinv.metrics import spatial_cosine
from featinv.models.featinv import FeatInv
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8

MAX_SAMPLES = 16
MAX_FACTOR = 2.0
ROW = 4  # pictures in a row of the figure


@dataclass(frozen=True)
class Settings:
    """All that a run depends on besides its model, concepts and images.

    Args:
        seed: Seed of the noise.
        num_samples: Reconstructions, 1 to `MAX_SAMPLES`.
        sampler: Values that replace those of the model's sampler, by name.
        factors: Factor of each steered concept, by its number, in [0, `MAX_FACTOR`]; 0 removes a
            concept, 1 changes nothing.
        weight: Weight of the second of two images, in [0, 1]; unused for one image.
        path: How features are mixed, see `featinv.analysis.edits.mix`.
        layer: The backbone's layer to invert; `None`: the model's default.
        precision: What the model draws in: `"32-true"` or `"bf16-mixed"`.

    Raises:
        InputError: A value out of its range.
    """

    seed: int = 0
    num_samples: int = 4
    sampler: dict[str, object] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)
    weight: float = 0.5
    path: str = "linear"
    layer: str | None = None
    precision: str = "32-true"

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
            probe: A file that `Probe.save` wrote, to tell classes by, or `None`.

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
