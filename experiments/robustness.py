"""What a classifier sees in altered images: their features are inverted.

python experiments/robustness.py checkpoint=RUN data=imagenette data.root=PATH

Corrupted images (ImageNet-C), adversarial examples against the model's own backbone, and images of
classes that the model never saw. What was altered is kept in `altered`, so that all models which
look at images of one size get the same; the rows are kept in `output`, and the same command again
goes on with the missing ones.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchvision.utils import make_grid

import harness
from featinv.analysis.perturbations import Alteration, attacks, corruptions
from featinv.backbones import Backbone
from featinv.cli.app import run_entry_point
from featinv.data import ShardsDataModule
from featinv.evaluation.draws import see
from featinv.evaluation.figures import save_png
from featinv.evaluation.kept import keep
from featinv.evaluation.set_metrics import extractor_backbone
from featinv.evaluation.witnesses import check_label_space
from featinv.models.base import Inverter
from featinv.utils.errors import at_least
from featinv.utils.pixels import from_uint8, resize, to_uint8
from settings import Setting, dependencies, open_setting

COLUMNS = {
    "changed": "prediction changed",
    "cosine": "spatial cosine to the altered image",
    "agreement": "same class as the altered image",
    "original": "same class as the original",
    "witness_altered": "witness: class of the altered image",
    "witness_original": "witness: class of the original",
}


def alter(path: Path, alteration: Alteration, images: Tensor, config: DictConfig) -> Tensor:
    """Return altered images, made now or kept from before, uint8, (N, 3, H, W).

    Raises:
        InputError: Those that were kept are of other images, or were made otherwise.
    """

    def make() -> dict[str, Tensor]:
        numbers = torch.arange(len(images)).split(16)
        return {"images": torch.cat([alteration(images[rows], rows.tolist()) for rows in numbers])}

    source = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
    wanted = {"images": source, "seed": config.seed, "attack_steps": config.attack_steps}
    return keep(path, wanted, make)["images"]


def ood_images(config: DictConfig, model: Inverter) -> Tensor:
    """Return images of classes that the model never saw, uint8, (N, 3, H, W)."""
    data = ShardsDataModule(
        val_shards=config.out_of_distribution,
        image_size=max(model.image_size, model.backbone.image_size),
        batch_size=16,
        interpolation=config.data.interpolation,
        max_images=config.num_images,
    )
    return torch.cat([batch["image"] for batch in data.test_dataloader()])


def invert(
    model: Inverter, witness: Backbone, originals: Tensor, altered: Tensor, config: DictConfig
) -> dict[str, Tensor]:
    """Invert the features of altered images.

    Args:
        model: Whose backbone sees them.
        witness: Another classifier.
        originals: uint8, shape (N, 3, H, W).
        altered: uint8, same shape.
        config: The experiment's.

    Returns:
        `COLUMNS`, each (N,), and the first reconstructions: `drawn`, uint8; with the images in the
        same size: `originals` and `altered`.
    """

    def small(images: Tensor) -> Tensor:
        return to_uint8(resize(from_uint8(images), model.image_size))

    def rows(chunk: Tensor) -> dict[str, Tensor]:
        features, logits = (x.to(model.device) for x in see(model.backbone, altered[chunk]))
        before = see(model.backbone, originals[chunk])[1].argmax(1).to(model.device)
        after = logits.argmax(1)
        draws = harness.draw_samples(model, features, chunk, config)
        witnessed = see(witness, to_uint8(draws.images))[1].argmax(1).to(model.device)
        return {
            "drawn": draws.first(),
            "originals": small(originals[chunk]),
            "altered": small(altered[chunk]),
            "changed": (before != after).float(),
            "cosine": draws.cosine(features),
            "agreement": draws.agreement(after),
            "original": draws.agreement(before),
            "witness_altered": draws.mean(witnessed == draws.repeat(after)),
            "witness_original": draws.mean(witnessed == draws.repeat(before)),
        }

    return harness.in_chunks(len(altered), config, rows)


def strip(values: dict[str, Tensor]) -> Tensor:
    """Lay out originals, altered images and reconstructions in three rows, uint8."""
    pictures = [values[name] for name in ("originals", "altered", "drawn")]
    return make_grid(torch.cat(pictures), nrow=len(pictures[0]), pad_value=255)


def main(config: DictConfig) -> None:
    """Alter, invert, compare; every row is kept as soon as it is there."""
    at_least("num_samples", config.num_samples, 1)
    model, config, sampling = open_setting(Setting("checkpoint", config.checkpoint), config)
    model.backbone.check_classifies()
    witness = extractor_backbone(config.witness, "witness").to(model.device)
    check_label_space(witness, model.backbone)
    backbone, batch = model.backbone, harness.load_images(config, model)
    images = batch["image"]
    kept = Path(config.altered) / f"{images.shape[-1]}px"  # models may look at other sizes

    def row(name: str, alteration: Alteration, folder: str = "") -> dict[str, Tensor]:
        path = kept / folder / f"{harness.file_name(name)}.safetensors"
        return invert(model, witness, images, alter(path, alteration, images, config), config)

    rows = {"unaltered": partial(invert, model, witness, images, images, config)}
    for name, alteration in corruptions(config.corruptions, config.severities, config.seed).items():
        rows[name] = partial(row, name, alteration)
    for name, alteration in attacks(
        backbone, config.attacks, config.eps, config.seed, config.attack_steps
    ).items():
        rows[name] = partial(row, name, alteration, backbone.name)
    if config.out_of_distribution is not None:
        unseen = ood_images(config, model)
        rows["out of distribution"] = partial(invert, model, witness, unseen, unseen, config)
    names = ("witness", "attack_steps", "out_of_distribution")
    results = harness.measure(rows, dependencies(config, config.checkpoint, *names), config)
    for name, values in results.items():
        save_png(strip(values), Path(config.output) / "strips" / f"{harness.file_name(name)}.png")
    about = (
        f"{harness.measured_caption(len(images), config, sampling)} Backbone {backbone.name}, "
        f"layer {backbone.layer}; witness {witness.name}."
    )
    harness.publish_measured(
        harness.interval_rows(results, COLUMNS, "images", batch["photograph"]),
        results,
        about,
        config,
    )


if __name__ == "__main__":
    run_entry_point(main, "robustness")
