"""Steer one concept, invert, and measure whether the images have less or more of it.

python experiments/steering.py checkpoint=RUN concepts=outputs/concepts/concepts.safetensors \
    concept=2 data=imagenette data.root=PATH

The same noise for every factor, so that images differ by the concept only.
"""

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from experiments.harness import draw, publish
from featinv import FeatInv
from featinv.analysis.concepts import Concepts
from featinv.analysis.edits import half
from featinv.cli.app import make_batches, run_entry_point, sampler_options
from featinv.evaluation.figures import gallery_figure, save_figure
from featinv.evaluation.tables import format_interval, save_numbers
from featinv.metrics import bootstrap_interval, spatial_cosine
from featinv.models.base import Inverter
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import from_uint8, to_uint8

log = logging.getLogger("steering")


@torch.no_grad()
def steer_batch(
    model: Inverter, concepts: Concepts, batch: dict, factor: float, config: DictConfig
) -> dict[str, Tensor]:
    """Steer, invert and measure one batch.

    Returns:
        `drawn` (uint8, (B, 3, H, W), the first samples); and, each of shape (B,): `asked`, the
        presence of the concept in the steered features, mean over positions; `presence`, the same
        in the features of the reconstructions; `probability` that the backbone gives to the class
        that it sees in the original; `cosine` of the reconstructions' and the steered features.
    """
    backbone = model.backbone
    features, logits = backbone.features_and_logits(from_uint8(batch["image"].to(model.device)))
    mask = None if config.side is None else half(features.shape[2:], config.side).to(model.device)
    steered = concepts.steer(features, config.concept, factor, mask)
    drawn = draw(model, steered, batch["index"], config)
    seen, seen_logits = backbone.features_and_logits(drawn.flatten(0, 1))

    def mean(values: Tensor) -> Tensor:
        return values.view(-1, config.num_samples).mean(1).cpu()

    def amount(of: Tensor) -> Tensor:
        return concepts.presence(of)[:, config.concept].mean(dim=(1, 2))

    best = logits.argmax(1).repeat_interleave(config.num_samples)
    return {
        "drawn": to_uint8(drawn[:, 0]).cpu(),
        "asked": amount(steered).cpu(),
        "presence": mean(amount(seen)),
        "probability": mean(seen_logits.softmax(1).gather(1, best[:, None])[:, 0]),
        "cosine": mean(spatial_cosine(steered.repeat_interleave(config.num_samples, 0), seen)),
    }


@torch.no_grad()
def choose(model: Inverter, concepts: Concepts, config: DictConfig) -> list[dict]:
    """Return batches of the images to steer: the first of the data, or those with most of it.

    Raises:
        InputError: `among` is less than `num_images`.
    """
    if config.among is None:
        return list(make_batches(config, model))
    if config.num_images is None or config.among < config.num_images:
        raise InputError(
            f"among is {config.among} with num_images={config.num_images}: expected to choose "
            "from more images than are steered, for example among=1000 num_images=100."
        )
    items, presence = [], []
    data = make_batches(OmegaConf.merge(config, {"num_images": config.among}), model)
    for batch in tqdm(data, unit="batch", desc="presence"):
        features = model.backbone.features(from_uint8(batch["image"].to(model.device)))
        presence += concepts.presence(features)[:, config.concept].mean(dim=(1, 2)).tolist()
        items += [{k: v[i] for k, v in batch.items()} for i in range(len(batch["index"]))]
    chosen = sorted(range(len(items)), key=lambda i: -presence[i])[: config.num_images]
    return list(DataLoader([items[i] for i in chosen], batch_size=32))


def table_rows(results: dict[float, dict[str, Tensor]]) -> list[dict[str, str]]:
    """Return the table, as text; changes are image by image, against factor 1."""
    rows = []
    for factor, values in results.items():
        change = values["presence"] - results[1.0]["presence"]
        shown = {
            "presence asked for": values["asked"],
            "presence in the reconstruction": values["presence"],
            "change against factor 1": change,
            "probability of the original's class": values["probability"],
            "spatial cosine": values["cosine"],
        }
        cells = {
            title: format_interval(float(v.mean()), *bootstrap_interval(v))
            for title, v in shown.items()
        }
        rows.append({"factor": f"{factor:g}"} | cells)
    return rows


def figure(originals: Tensor, results: dict[float, dict[str, Tensor]], number: int, title: str):
    """Draw the first images, their reconstructions by factor, and what differs between the ends."""
    factors = sorted(results)
    least, most = (results[f]["drawn"].int() for f in (factors[0], factors[-1]))
    difference = (most - least).abs().amax(1, keepdim=True).expand(-1, 3, -1, -1).byte()
    pictures, captions = [], []
    for i in range(number):
        drawn = [results[f]["drawn"][i] for f in factors]
        pictures.append([originals[i], *drawn, difference[i]])
        captions.append(["", *(f"presence {results[f]['presence'][i]:.2f}" for f in factors), ""])
    columns = ["original", *(f"x {f:g}" for f in factors), "difference"]
    return gallery_figure(pictures, columns=columns, captions=captions, title=title)


def main(config: DictConfig) -> None:
    """Steer by every factor, write table and figure."""
    at_least("num_samples", config.num_samples, 1)
    factors = sorted({float(factor) for factor in config.factors} | {1.0})
    model = FeatInv.load(config.checkpoint).to(pick_device(config.device))
    concepts = Concepts.load(config.concepts)
    if not 0 <= config.concept < len(concepts):
        raise InputError(
            f"There is no concept {config.concept}: expected 0 to {len(concepts) - 1}, those of "
            f"'{config.concepts}'."
        )
    batches = choose(model, concepts, config)
    results: dict[float, dict[str, Tensor]] = {}
    for factor in tqdm(factors, unit="factor", desc="steering"):
        parts = [steer_batch(model, concepts, batch, factor, config) for batch in batches]
        results[factor] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    originals = torch.cat([batch["image"] for batch in batches])
    output = Path(config.output)
    title = f"concept {config.concept} of {concepts.layer}, attenuated and amplified; same noise"
    number = min(config.num_pictures, len(originals))
    save_figure(figure(originals, results, number, title), output / "sweep.png")
    rows = table_rows(results)
    where = f" in the {config.side} half" if config.side else ""
    how = model.settings(**sampler_options(config)).describe()
    those = f" with most of it among {config.among}" if config.among else ""
    about = (
        f"Concept {config.concept} ({concepts.method}){where}; {len(originals)} images{those}, "
        f"{config.num_samples} sample(s) each, seed {config.seed}; {how}; "
        "mean over images with 95% bootstrap interval."
    )
    publish(rows, about, config)
    save_numbers({f"{f:g}": values for f, values in results.items()}, output / "results.json")


if __name__ == "__main__":
    run_entry_point(main, "steering")
