"""What a classifier sees in altered images: their features are inverted.

python experiments/robustness.py checkpoint=RUN data=imagenette data.root=PATH

Corrupted images (ImageNet-C), adversarial examples against the model's own backbone, and images of
classes that the model never saw. What was altered is kept in `altered`, so that every model gets
the same; the rows are kept in `output`, and the same command again goes on with the missing ones.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from experiments.harness import draw, publish
from featinv import FeatInv
from featinv.analysis.perturbations import CORRUPTIONS, corrupt, fgsm, pgd
from featinv.backbones import Backbone
from featinv.cli.app import make_batches, run_entry_point, sampler_options
from featinv.data import ShardsDataModule
from featinv.evaluation.figures import save_png
from featinv.evaluation.set_metrics import extractor_backbone
from featinv.evaluation.tables import format_interval
from featinv.evaluation.witnesses import check_label_space
from featinv.metrics import bootstrap_interval, spatial_cosine
from featinv.models.base import Inverter
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least, unknown
from featinv.utils.pixels import from_uint8, resize, to_uint8

log = logging.getLogger("robustness")

ATTACKS = ("fgsm", "pgd")
COLUMNS = {
    "changed": "prediction changed",
    "cosine": "spatial cosine to the altered image",
    "agreement": "same class as the altered image",
    "original": "same class as the original",
    "witness_altered": "witness: class of the altered image",
    "witness_original": "witness: class of the original",
}


def alterations(config: DictConfig, backbone: Backbone) -> dict[str, Callable]:
    """Return name -> what makes altered uint8 images of uint8 images and their numbers.

    Raises:
        InputError: Unknown corruption or attack.
    """
    names = CORRUPTIONS if config.corruptions is None else tuple(config.corruptions)
    made: dict[str, Callable] = {}
    for name in names:
        if name not in CORRUPTIONS:
            raise unknown("corruption", name, CORRUPTIONS)
        for severity in config.severities:
            made[f"{name} {severity}"] = lambda images, numbers, n=name, s=severity: corrupt(
                images, n, s, config.seed, numbers
            )
    for attack in config.attacks:
        if attack not in ATTACKS:
            raise unknown("attack", attack, ATTACKS)
        for eps in config.eps:
            steps = {"num_steps": config.attack_steps, "seed": config.seed}
            steps = steps if attack == "pgd" else {}
            made[f"{attack} {eps}/255"] = partial(
                mislead, backbone, {"fgsm": fgsm, "pgd": pgd}[attack], eps=eps, **steps
            )
    return made


def mislead(
    backbone: Backbone, attack: Callable, images: Tensor, numbers: list[int], **options: float
) -> Tensor:
    """Return adversarial examples, uint8 on the CPU, wherever the backbone is."""
    options |= {"indices": numbers} if "seed" in options else {}  # of a random start
    attacked = attack(backbone, from_uint8(images.to(backbone.mean.device)), **options)
    return to_uint8(attacked).cpu()


def altered_images(folder: Path, name: str, alter: Callable, images: Tensor) -> Tensor:
    """Return altered images, made now or kept from before, uint8, (N, 3, H, W).

    Raises:
        InputError: Those that were kept are of other images.
    """
    path = folder / f"{file_name(name)}.safetensors"
    source = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if file.metadata() != {"of": source}:
                raise InputError(
                    f"'{path}' holds altered versions of other images: expected another folder, "
                    "altered=..., or the images of before."
                )
            return file.get_tensor("images")
    numbers = torch.arange(len(images))
    parts = [
        alter(images[rows], rows.tolist())
        for rows in tqdm(numbers.split(16), desc=name, unit="batch", leave=False)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"images": torch.cat(parts).contiguous()}, path, {"of": source})
    return torch.cat(parts)


@torch.no_grad()
def measure(
    model: Inverter, witness: Backbone, originals: Tensor, altered: Tensor, config: DictConfig
) -> tuple[dict[str, list[float]], Tensor]:
    """Invert the features of altered images.

    Args:
        model: Whose backbone sees them.
        witness: Another classifier.
        originals: uint8, shape (N, 3, H, W).
        altered: uint8, same shape.
        config: `num_samples`, `seed`, `batch_size`, `sampler`.

    Returns:
        For each of `COLUMNS` one number per image, and the first reconstructions, uint8.
    """
    values: dict[str, list[float]] = {name: [] for name in COLUMNS}
    pictures = []
    for rows in tqdm(
        torch.arange(len(altered)).split(16), unit="batch", desc="invert", leave=False
    ):
        clean, seen = (from_uint8(x[rows].to(model.device)) for x in (originals, altered))
        features, logits = model.backbone.features_and_logits(seen)
        drawn = draw(model, features, rows, config)
        pictures.append(to_uint8(drawn[:, 0]).cpu())
        drawn = drawn.flatten(0, 1)
        drawn_features, drawn_logits = model.backbone.features_and_logits(drawn)

        def mean(per_sample: Tensor) -> list[float]:
            return per_sample.float().view(-1, config.num_samples).mean(1).tolist()

        def repeated(per_image: Tensor) -> Tensor:
            return per_image.repeat_interleave(config.num_samples, 0)

        original, changed = model.backbone.classify(clean).argmax(1), logits.argmax(1)
        said = witness.classify(drawn).argmax(1)
        values["changed"] += (original != changed).float().tolist()
        values["cosine"] += mean(spatial_cosine(repeated(features), drawn_features))
        values["agreement"] += mean(drawn_logits.argmax(1) == repeated(changed))
        values["original"] += mean(drawn_logits.argmax(1) == repeated(original))
        values["witness_altered"] += mean(said == repeated(changed))
        values["witness_original"] += mean(said == repeated(original))
    return values, torch.cat(pictures)


def table_rows(results: dict[str, dict[str, list[float]]]) -> list[dict[str, str]]:
    """Return the table, as text: mean over images with 95% bootstrap interval."""
    rows = []
    for name, values in results.items():
        cells = {
            title: format_interval(
                sum(values[key]) / len(values[key]), *bootstrap_interval(values[key])
            )
            for key, title in COLUMNS.items()
        }
        rows.append({"images": name} | cells)
    return rows


def load_images(config: DictConfig, model: Inverter) -> Tensor:
    """Return the images of the data set, uint8, (N, 3, H, W)."""
    return torch.cat([batch["image"] for batch in make_batches(config, model)])


def strangers(config: DictConfig, model: Inverter) -> Tensor:
    """Return images of classes that the model never saw, uint8, (N, 3, H, W)."""
    size = max(model.image_size, model.backbone.image_size)
    data = ShardsDataModule(
        val_shards=config.out_of_distribution,
        image_size=size,
        batch_size=16,
        max_images=config.num_images,
    )
    return torch.cat([batch["image"] for batch in data.test_dataloader()])


def main(config: DictConfig) -> None:
    """Alter, invert, compare; write every row as soon as it is there."""
    at_least("num_samples", config.num_samples, 1)
    for number in config.severities:
        at_least("severities", number, 1)
    model = FeatInv.load(config.checkpoint).to(pick_device(config.device))
    witness = extractor_backbone(config.witness).to(model.device)
    check_label_space(witness, model.backbone)
    made = alterations(config, model.backbone)
    images = load_images(config, model)
    output = Path(config.output)
    sets = {"unaltered": lambda: (images, images)}
    for name, alter in made.items():
        folder = Path(config.altered) / (model.backbone.name if "/255" in name else "")
        sets[name] = lambda f=folder, n=name, a=alter: (images, altered_images(f, n, a, images))
    if config.out_of_distribution is not None:
        unseen = strangers(config, model)
        sets["out of distribution"] = lambda: (unseen, unseen)
    results_file = output / "results.json"
    kept = json.loads(results_file.read_text()) if results_file.is_file() else {}
    settings = {"checkpoint": str(config.checkpoint), "num_images": len(images)}
    told = ("num_samples", "seed", "precision", "witness", "attack_steps", "out_of_distribution")
    settings |= {key: config[key] for key in told}
    settings |= {"sampler": sampler_options(config), "data": OmegaConf.to_container(config.data)}
    results = kept.get("rows", {}) if kept.get("settings") == settings else {}
    for name, make in tqdm(sets.items(), unit="row", desc="robustness"):
        if name in results:
            continue
        originals, altered = make()
        results[name], drawn = measure(model, witness, originals, altered, config)
        number = min(config.num_pictures, len(altered))
        path = output / "strips" / f"{file_name(name)}.png"
        save_png(strip(originals[:number], altered[:number], drawn[:number]), path)
        results_file.write_text(json.dumps({"settings": settings, "rows": results}) + "\n")
    rows = table_rows({name: results[name] for name in sets})
    how = model.settings(**sampler_options(config)).describe()
    about = (
        f"{len(images)} images, {config.num_samples} sample(s) each, seed {config.seed}; "
        f"{how}; mean over images with 95% bootstrap interval. Backbone "
        f"{model.backbone.name}, layer {model.backbone.layer}; witness {witness.name}."
    )
    publish(rows, about, config)


def strip(originals: Tensor, altered: Tensor, drawn: Tensor) -> Tensor:
    """Lay out originals, altered images and reconstructions in three rows, uint8."""
    size = drawn.shape[-1]
    small = [to_uint8(resize(from_uint8(view), size)) for view in (originals, altered)]
    return make_grid(torch.cat([*small, drawn]), nrow=len(drawn), pad_value=255)


def file_name(name: str) -> str:
    """Return the name of a row as one that a file can have."""
    return name.replace(" ", "_").replace("/", "_of_")


if __name__ == "__main__":
    run_entry_point(main, "robustness")
