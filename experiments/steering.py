"""Steer one concept, invert, and measure how much of it the reconstructions have.

python experiments/steering.py checkpoint=RUN concepts=outputs/concepts/concepts.safetensors \
    concept=2 data=imagenette data.root=PATH
python experiments/steering.py checkpoint=RUN concepts=outputs/concepts/concepts.safetensors \
    label=497 among=1000 data=imagenette data.root=PATH

All factors share their noise, so reconstructions differ by the concept only. The second command
picks the concept by its meaning: the one whose removal costs the class (497, church) most.
"""

from functools import partial

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import harness
from drawing import draw_samples, in_chunks, load_images, select
from featinv.analysis.concepts import Concepts, importance
from featinv.analysis.edits import half
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import extract
from featinv.models.base import Inverter
from featinv.utils.errors import InputError
from harness import Column
from settings import dependencies, file_hash, open_checkpoint

COLUMNS = {
    "wanted": "presence in the steered features",
    "presence": "presence in the reconstruction",
    "change": "change against factor 1",
    "probability": "probability of the original's class",
    "cosine": "spatial cosine",
}


def choose(model: Inverter, concepts: Concepts, config: DictConfig) -> tuple[int, dict]:
    """Return the concept to steer, and the images: the first ones, or those with most of it."""
    concept, label, among = config.concept, config.label, config.among
    if concept is not None and label is not None:
        raise InputError(
            f"concept is {concept} with label={label}, which picks one itself: expected one of the "
            "two."
        )
    if among is not None and (config.num_images is None or among < config.num_images):
        raise InputError(
            f"among is {among} with num_images={config.num_images}: expected to choose from more "
            "images than are steered, for example among=1000 num_images=100."
        )
    images = load_images(OmegaConf.merge(config, {"num_images": among or config.num_images}), model)
    features, logits = extract(model.backbone, images["image"])
    concept = concept or 0
    if label is not None:
        classes = logits.argmax(1)
        if label not in classes:
            raise InputError(
                f"label is {label}, but none of {len(classes)} images is classified as that: "
                f"expected a predicted class, for example {classes.mode().values}, or more images "
                "(among=1000)."
            )
        own = features[classes == label]
        labels = classes[classes == label]
        drops = importance(model.backbone, concepts, own, concepts.presence(own), labels)
        concept = int(drops.mean(dim=0).argmax())
    if not 0 <= concept < len(concepts):
        raise InputError(
            f"There is no concept {concept}: expected 0 to {len(concepts) - 1}, those of "
            f"'{config.concepts}'."
        )
    if among is not None:
        amounts = concepts.presence(features)[:, concept].mean(dim=(1, 2))
        images = select(images, amounts.argsort(descending=True, stable=True)[: config.num_images])
    return concept, images


def steer(
    model: Inverter,
    concepts: Concepts,
    concept: int,
    images: dict,
    factor: float,
    config: DictConfig,
) -> dict[str, Tensor]:
    """Steer and invert all images.

    Returns `drawn`, the first samples, uint8, (N, 3, H, W), and `COLUMNS`, each (N,), apart from
    `change`. The presence of a concept is its mean over the positions.
    """

    def amount(features: Tensor) -> Tensor:
        return concepts.presence(features)[:, concept].mean(dim=(1, 2))

    def draw(rows: Tensor) -> dict[str, Tensor]:
        features, logits = (
            x.to(model.device) for x in extract(model.backbone, images["image"][rows])
        )
        mask = None
        if config.side is not None:
            mask = half(features.shape[2:], config.side).to(model.device)
        steered = concepts.steer(features, {concept: factor}, mask)
        draws = draw_samples(model, steered, images["index"][rows], config)
        return {
            "drawn": draws.first(),
            "wanted": amount(steered).cpu(),
            "presence": draws.mean(amount(draws.features)),
            "probability": draws.probability(logits.argmax(1)),
            "cosine": draws.cosine(steered),
        }

    return in_chunks(images, config, draw)


def figure_columns(originals: Tensor, results: harness.Results) -> list[Column]:
    """Return originals, reconstructions by factor, and the difference of the extreme factors."""
    columns = [
        Column(f"x {factor}", v["drawn"], [f"presence {p:.2f}" for p in v["presence"]])
        for factor, v in results.items()
    ]
    first, last = (columns[i].pictures.int() for i in (0, -1))
    difference = (last - first).abs().amax(1, keepdim=True).expand(-1, 3, -1, -1).byte()
    return [Column("original", originals), *columns, Column("difference", difference)]


def main(config: DictConfig) -> None:
    """Steer by every factor, write table and figure."""
    factors = sorted({float(factor) for factor in config.factors} | {1.0})
    model, sampling = open_checkpoint(config)
    model.backbone.check_classifies()
    concepts = Concepts.load(config.concepts)
    if config.side is not None:
        half((2, 2), config.side)  # raises for an unknown one
    concept, images = choose(model, concepts, config)
    rows = {
        f"{factor:g}": partial(steer, model, concepts, concept, images, factor, config)
        for factor in factors
    }
    depends_on = dependencies(config, config.checkpoint, "side", "among")
    depends_on |= {"concepts": file_hash(config.concepts), "concept": concept}
    results = harness.measure(rows, depends_on, config)
    for values in results.values():  # of each image
        values["change"] = values["presence"] - results["1"]["presence"]
    title = f"concept {concept} of {concepts.layer}, attenuated and amplified; same noise"
    columns = figure_columns(images["image"], results)
    harness.save_pictures(columns, f"{config.output}/sweep.png", title)
    need = "" if config.label is None else f", the one that class {config.label} needs most"
    where = f" in the {config.side} half" if config.side else ""
    which = f", those with most of it among {config.among}" if config.among else ""
    about = (
        f"Concept {concept} ({concepts.method}){need}{where}{which}; "
        f"{harness.measured_caption(len(images['image']), config, sampling)}"
    )
    rows = harness.interval_rows(results, COLUMNS, "factor")
    harness.publish(rows, about, config, results)


if __name__ == "__main__":
    run_entry_point(main, "steering")
