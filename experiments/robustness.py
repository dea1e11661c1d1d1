"""What a classifier sees in altered images: their features are inverted.

python experiments/robustness.py checkpoint=RUN data=imagenette data.root=PATH

Images are corrupted (ImageNet-C), adversarial against the model's own backbone, or of classes that
the model never saw. Altered images are kept in `altered`, so that all models that see images of one
size get the same ones.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchvision.utils import make_grid

import harness
from drawing import draw_samples, in_chunks, join, load_images
from featinv.analysis.perturbations import Alteration, attacks, corruptions
from featinv.backbones import Backbone
from featinv.cli.app import run_entry_point
from featinv.data import ShardsDataModule
from featinv.evaluation.cache import load_or_make
from featinv.evaluation.draws import extract
from featinv.evaluation.figures import save_png
from featinv.evaluation.witnesses import load_witness
from featinv.models.base import Inverter
from featinv.utils.errors import InputError
from featinv.utils.pixels import from_uint8, resize, to_uint8
from settings import dependencies, open_checkpoint

COLUMNS = {
    "changed": "prediction changed",
    "cosine": "spatial cosine to the altered image",
    "agreement": "same class as the altered image",
    "original": "same class as the original",
    "witness_altered": "witness: class of the altered image",
    "witness_original": "witness: class of the original",
}


def alter(path: Path, alteration: Alteration, images: Tensor, config: DictConfig) -> Tensor:
    """Return altered images, made now or kept from before, uint8, (N, 3, H, W)."""

    def make() -> dict[str, Tensor]:
        numbers = torch.arange(len(images)).split(16)
        return {"images": torch.cat([alteration(images[rows], rows.tolist()) for rows in numbers])}

    source = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
    wanted = {"images": source, "seed": config.seed, "attack_steps": config.attack_steps}
    return load_or_make(path, wanted, make)["images"]


def ood_images(config: DictConfig, model: Inverter) -> dict:
    """Return images of classes that the model never saw, as a batch."""
    data = ShardsDataModule(
        val_shards=config.out_of_distribution,
        image_size=max(model.image_size, model.backbone.image_size),
        batch_size=16,
        interpolation=config.data.interpolation,
        max_images=config.num_images,
    )
    return join(data.test_dataloader())


def invert(
    model: Inverter, witness: Backbone, images: dict, altered: Tensor, config: DictConfig
) -> dict[str, Tensor]:
    """Invert the features of altered images, uint8, (N, 3, H, W), of a batch of originals.

    Returns `COLUMNS`, each (N,), and pictures of one size, uint8: `originals`, `altered` and the
    first samples, `drawn`.
    """

    def small(pictures: Tensor) -> Tensor:
        return to_uint8(resize(from_uint8(pictures), model.image_size))

    def draw(rows: Tensor) -> dict[str, Tensor]:
        originals = images["image"][rows]
        features, logits = (x.to(model.device) for x in extract(model.backbone, altered[rows]))
        before = extract(model.backbone, originals)[1].argmax(1).to(model.device)
        after = logits.argmax(1)
        draws = draw_samples(model, features, images["index"][rows], config)
        witnessed = extract(witness, to_uint8(draws.images))[1].argmax(1).to(model.device)
        return {
            "drawn": draws.first(),
            "originals": small(originals),
            "altered": small(altered[rows]),
            "changed": (before != after).float(),
            "cosine": draws.cosine(features),
            "agreement": draws.agreement(after),
            "original": draws.agreement(before),
            "witness_altered": draws.mean(witnessed == draws.repeat(after)),
            "witness_original": draws.mean(witnessed == draws.repeat(before)),
        }

    return in_chunks(images, config, draw)


def main(config: DictConfig) -> None:
    """Alter, invert, write table and a strip of pictures for each row."""
    model, sampling = open_checkpoint(config)
    backbone = model.backbone
    backbone.check_classifies()
    witness = load_witness(config.witness, model)
    if witness.num_classes != backbone.num_classes:
        raise InputError(
            f"The witness '{witness.name}' has {witness.num_classes} classes and '{backbone.name}' "
            f"{backbone.num_classes}, so their predictions do not compare: expected a witness with "
            f"{backbone.num_classes} classes."
        )
    images = load_images(config, model)
    whole = images["image"]
    kept = Path(config.altered) / f"{whole.shape[-1]}px"  # models may see other sizes

    def row(name: str, alteration: Alteration, folder: str = "") -> dict[str, Tensor]:
        path = kept / folder / f"{harness.file_name(name)}.safetensors"
        return invert(model, witness, images, alter(path, alteration, whole, config), config)

    rows = {"unaltered": partial(invert, model, witness, images, whole, config)}
    corrupted = corruptions(config.corruptions, config.severities, config.seed)
    attacked = attacks(backbone, config.attacks, config.eps, config.seed, config.attack_steps)
    rows |= {name: partial(row, name, alteration) for name, alteration in corrupted.items()}
    rows |= {name: partial(row, name, a, backbone.name) for name, a in attacked.items()}
    if config.out_of_distribution is not None:
        unseen = ood_images(config, model)
        whole_unseen = unseen["image"]
        rows["out of distribution"] = partial(invert, model, witness, unseen, whole_unseen, config)
    names = ("witness", "attack_steps", "out_of_distribution")
    results = harness.measure(rows, dependencies(config, config.checkpoint, *names), config)
    for name, values in results.items():
        pictures = [values[key] for key in ("originals", "altered", "drawn")]
        strip = make_grid(torch.cat(pictures), nrow=len(pictures[0]), pad_value=255)
        save_png(strip, f"{config.output}/strips/{harness.file_name(name)}.png")
    about = (
        f"{harness.measured_caption(len(whole), config, sampling)} Backbone {backbone.name}, "
        f"layer {backbone.layer}; witness {witness.name}."
    )
    harness.publish(harness.interval_rows(results, COLUMNS, "images"), about, config, results)


if __name__ == "__main__":
    run_entry_point(main, "robustness")
