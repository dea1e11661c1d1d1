"""Steer one concept, invert, and measure whether the images have less or more of it.

python experiments/steering.py checkpoint=RUN concepts=outputs/concepts/concepts.safetensors \
    concept=2 data=imagenette data.root=PATH
python experiments/steering.py checkpoint=RUN concepts=outputs/concepts/concepts.safetensors \
    label=497 among=1000 data=imagenette data.root=PATH

The same noise for every factor, so that images differ by the concept only. The second command
chooses the concept by what it means: the one whose removal costs the class (497, church) most.
"""

from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import harness
from featinv.analysis.concepts import Concepts, needed_concept
from featinv.analysis.edits import half
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import see
from featinv.evaluation.figures import gallery_figure, save_figure
from featinv.models.base import Inverter
from featinv.utils.errors import InputError, at_least
from settings import Setting, dependencies, file_hash, open_setting

COLUMNS = {
    "wanted": "presence in the steered features",
    "presence": "presence in the reconstruction",
    "change": "change against factor 1",
    "probability": "probability of the original's class",
    "cosine": "spatial cosine",
}


def choose_concept(model: Inverter, concepts: Concepts, images: Tensor, config: DictConfig) -> int:
    """Return the number of the concept to steer.

    Raises:
        InputError: There is no such concept, or no image of the class.
    """
    if config.concept is not None and config.label is not None:
        raise InputError(
            f"concept is {config.concept} with label={config.label}, which chooses one itself: "
            "expected one of both."
        )
    if config.label is None:
        concept = config.concept or 0
        if not 0 <= concept < len(concepts):
            raise InputError(
                f"There is no concept {concept}: expected 0 to {len(concepts) - 1}, those of "
                f"'{config.concepts}'."
            )
        return concept
    features, logits = see(model.backbone, images)
    own = logits.argmax(1) == config.label
    if not own.any():
        raise InputError(
            f"label is {config.label}, but none of {len(images)} images is classified as that: "
            "expected a class among them, for example "
            f"{logits.argmax(1).mode().values}, or more of them (among=1000)."
        )
    return needed_concept(model.backbone, concepts, features[own], config.label)


def choose_images(model: Inverter, concepts: Concepts, config: DictConfig) -> tuple[int, dict]:
    """Return the concept, and the images to steer: the first of the data, or those with most of it.

    Raises:
        InputError: `among` is less than `num_images`.
    """
    if config.among is None:
        images = harness.load_images(config, model)
        return choose_concept(model, concepts, images["image"], config), images
    if config.num_images is None or config.among < config.num_images:
        raise InputError(
            f"among is {config.among} with num_images={config.num_images}: expected to choose "
            "from more images than are steered, for example among=1000 num_images=100."
        )
    images = harness.load_images(OmegaConf.merge(config, {"num_images": config.among}), model)
    concept = choose_concept(model, concepts, images["image"], config)
    amounts = [
        concepts.presence(see(model.backbone, part)[0])[:, concept].mean(dim=(1, 2))
        for part in images["image"].split(256)
    ]
    rows = torch.cat(amounts).argsort(descending=True, stable=True)[: config.num_images].tolist()
    return concept, {
        name: values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]
        for name, values in images.items()
    }


def steer(
    model: Inverter, concepts: Concepts, concept: int, images: dict, factor: float, config
) -> dict[str, Tensor]:
    """Steer and invert all images.

    Returns:
        `drawn` (uint8, (N, 3, H, W), the first samples); and, each of shape (N,): `wanted`, the
        presence of the concept in the steered features, mean over positions; `presence`, the same
        in the features of the reconstructions; `probability` that the backbone gives to the class
        that it sees in the original; `cosine` of the reconstructions' and the steered features.
    """

    def amount(features: Tensor) -> Tensor:
        return concepts.presence(features)[:, concept].mean(dim=(1, 2))

    def rows(chunk: Tensor) -> dict[str, Tensor]:
        features, logits = (x.to(model.device) for x in see(model.backbone, images["image"][chunk]))
        shape = features.shape[2:]
        mask = None if config.side is None else half(shape, config.side).to(model.device)
        steered = concepts.steer(features, concept, factor, mask)
        draws = harness.draw_samples(model, steered, images["index"][chunk], config)
        return {
            "drawn": draws.first(),
            "wanted": amount(steered).cpu(),
            "presence": draws.mean(amount(draws.features)),
            "probability": draws.probability(logits.argmax(1)),
            "cosine": draws.cosine(steered),
        }

    return harness.in_chunks(len(images["image"]), config, rows)


def steering_figure(originals: Tensor, results: dict[str, dict[str, Tensor]], title: str) -> Figure:
    """Draw images, their reconstructions by factor, and what differs between the ends."""
    drawn = [values["drawn"].int() for values in results.values()]
    difference = (drawn[-1] - drawn[0]).abs().amax(1, keepdim=True).expand(-1, 3, -1, -1).byte()
    pictures, captions = [], []
    for i, original in enumerate(originals):
        drawn = [values["drawn"][i] for values in results.values()]
        pictures.append([original, *drawn, difference[i]])
        presence = [f"presence {values['presence'][i]:.2f}" for values in results.values()]
        captions.append(["", *presence, ""])
    columns = ["original", *(f"x {factor}" for factor in results), "difference"]
    return gallery_figure(pictures, columns=columns, captions=captions, title=title)


def main(config: DictConfig) -> None:
    """Steer by every factor, write table and figure."""
    at_least("num_samples", config.num_samples, 1)
    factors = sorted({float(factor) for factor in config.factors} | {1.0})
    model, config, sampling = open_setting(Setting("checkpoint", config.checkpoint), config)
    model.backbone.check_classifies()
    concepts = Concepts.load(config.concepts)
    if config.side is not None:
        half((2, 2), config.side)  # raises for an unknown one
    concept, images = choose_images(model, concepts, config)
    rows = {
        f"{factor:g}": partial(steer, model, concepts, concept, images, factor, config)
        for factor in factors
    }
    depends_on = dependencies(config, config.checkpoint, "side", "among")
    depends_on |= {"concepts": file_hash(config.concepts), "concept": concept}
    results = harness.measure(rows, depends_on, config)
    for values in results.values():  # image by image
        values["change"] = values["presence"] - results["1"]["presence"]
    output = Path(config.output)
    title = f"concept {concept} of {concepts.layer}, attenuated and amplified; same noise"
    originals = images["image"][: config.num_pictures]
    save_figure(steering_figure(originals, results, title), output / "sweep.png")
    where = f" in the {config.side} half" if config.side else ""
    those = f", those with most of it among {config.among}" if config.among else ""
    need = "" if config.label is None else f", the one that class {config.label} needs most"
    about = (
        f"Concept {concept} ({concepts.method}){need}{where}{those}; "
        f"{harness.measured_caption(len(images['image']), config, sampling)}"
    )
    rows = harness.interval_rows(results, COLUMNS, "factor", images["photograph"])
    harness.publish_measured(rows, results, about, config)


if __name__ == "__main__":
    run_entry_point(main, "steering")
