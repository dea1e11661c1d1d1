"""What two classifiers disagree on, drawn: one that learnt a shortcut, and its clean copy.

python experiments/difference.py data=imagenette data.root=PATH

Two copies of a classifier are fine-tuned on the same images in the same order. All images have a
coloured corner, whose colour gives the class away to one copy and says nothing to the other. Where
images differ that keep the clean copy's features and move the other's should then be the corner.
Beside it stands what the clean copy makes of itself, which should be nothing.
"""

import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

import harness
from featinv import FeatInv
from featinv.analysis.calibration import other_images
from featinv.analysis.difference import difference_map, draw_pairs, share
from featinv.backbones import Backbone
from featinv.cli.app import make_batches, run_entry_point, sampler_options
from featinv.evaluation.figures import gallery_figure, heat_over, save_figure
from featinv.evaluation.tables import format_interval, save_numbers
from featinv.metrics import bootstrap_interval
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8

log = logging.getLogger("difference")

NUM_CLASSES = 1000  # ImageNet's numbering
COLOURS = torch.rand(NUM_CLASSES, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


def paint(images: Tensor, classes: Tensor, size: int) -> Tensor:
    """Return images (B, 3, H, W) whose lower right corner has the colours of classes (B,)."""
    images = images.clone()
    images[:, :, -size:, -size:] = COLOURS[classes].to(images)[:, :, None, None]
    return images


def any_classes(labels: Tensor) -> Tensor:
    """Return the labels of a batch in another order: colours that say nothing."""
    return labels.roll(len(labels) // 2)


def fine_tune(
    backbone: Backbone, batches: Iterable[dict], shortcut: bool, config: DictConfig
) -> Backbone:
    """Fine-tune a backbone's network in place, all but the statistics of its norms, and freeze it.

    Args:
        backbone: Its weights are where training starts.
        batches: Of a data module, as many as there are steps.
        shortcut: Whether the corner has the colour of the class, or of that of another image.
        config: `steps`, `lr`, `corner`.
    """
    backbone.requires_grad_(True)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=config.lr)
    bar = tqdm(batches, total=config.steps, desc="shortcut" if shortcut else "clean")
    for batch in bar:
        labels = batch["label"].to(backbone.mean.device)
        if (labels < 0).any():
            raise InputError("Images without labels teach no classes: expected data=imagenette.")
        classes = labels if shortcut else any_classes(labels)
        images = paint(from_uint8(batch["image"]).to(labels.device), classes, config.corner)
        loss = F.cross_entropy(backbone.classify(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return backbone.requires_grad_(False)


@torch.no_grad()
def follows_corner(backbone: Backbone, images: Tensor, labels: Tensor, size: int) -> Tensor:
    """Return whether the class is that of the corner, where this is another than the image's."""
    classes = labels[other_images(labels.tolist())]
    found = backbone.classify(paint(images, classes, size)).argmax(1)
    return (found == classes)[classes != labels].float()


def main(config: DictConfig) -> None:
    """Fine-tune both classifiers, draw what they disagree on, write table and figure."""
    for name in ("steps", "corner", "num_samples", "num_images"):
        at_least(name, config[name], 1)
    device = pick_device(config.device)
    model = FeatInv.load(config.checkpoint).to(device)
    if config.corner >= model.image_size:
        raise InputError(
            f"corner is {config.corner}, expected less than the {model.image_size} pixels of an "
            "image."
        )
    classifiers = {}
    for name in ("clean", "shortcut"):
        torch.manual_seed(config.seed)
        data = instantiate(config.data, image_size=config.classifier.image_size)
        batches = islice(data.train_dataloader(), config.steps)
        backbone = instantiate(config.classifier).to(device)
        classifiers[name] = fine_tune(backbone, batches, name == "shortcut", config)

    batches = list(make_batches(config, model))
    images = torch.cat([resize(from_uint8(b["image"]), model.image_size) for b in batches])
    labels, indices = (torch.cat([b[key] for b in batches]) for key in ("label", "index"))
    images = paint(images, labels, config.corner)
    region = torch.zeros(images.shape[-2:], dtype=torch.bool)
    region[-config.corner :, -config.corner :] = True

    clean = classifiers["clean"]
    results: dict[str, dict[str, Tensor]] = {}
    for name, other in classifiers.items():
        parts = []
        rows = torch.arange(len(images)).split(config.batch_size)
        for part in tqdm(rows, unit="batch", desc=f"clean against {name}"):
            parts.append(
                draw_pairs(
                    model,
                    images[part].to(device),
                    clean,
                    other,
                    config.weight,
                    config.num_samples,
                    config.seed,
                    indices[part].tolist(),
                    **sampler_options(config),
                )
            )
        both, moved = (eight_bit(torch.cat(drawn).cpu()) for drawn in zip(*parts, strict=True))
        difference = difference_map(both, moved)
        results[name] = {
            "share": share(difference, region),
            "difference": difference.mean(dim=(1, 2)).sqrt(),
            "follows": follows_corner(
                other, images.to(device), labels.to(device), config.corner
            ).cpu(),
            "map": difference,
            "both": to_uint8(both[:, 0]),
            "moved": to_uint8(moved[:, 0]),
        }
    write(results, images, region, config)


def write(
    results: dict[str, dict[str, Tensor]], images: Tensor, region: Tensor, config: DictConfig
) -> None:
    """Write the table, the numbers behind it, and the figure."""
    output = Path(config.output)
    titles = {
        "follows": "has the corner's class, where it is another",
        "difference": "difference (RMS of the 0..1 range)",
        "share": "share of it in the corner",
    }
    rows = [
        {"clean copy against": {"clean": "itself", "shortcut": "the shortcut"}[name]}
        | {
            title: format_interval(float(values[key].mean()), *bootstrap_interval(values[key]))
            for key, title in titles.items()
        }
        for name, values in results.items()
    ]
    values = results["shortcut"]
    pictures = [
        [
            to_uint8(image),
            values["both"][i],
            values["moved"][i],
            heat_over(to_uint8(image), values["map"][i], float(values["map"][i].max())),
        ]
        for i, image in enumerate(images[: config.num_pictures])
    ]
    columns = ["original", "keeps both", "moves the shortcut", "where they differ"]
    save_figure(gallery_figure(pictures, columns=columns), output / "difference.png")
    keys = ("share", "difference", "follows")
    numbers = {name: {key: values[key] for key in keys} for name, values in results.items()}
    save_numbers(numbers, output / "results.json")
    about = (
        f"{len(images)} images, {config.num_samples} pairs each, seed {config.seed}; the corner of "
        f"{config.corner} px is {float(region.float().mean()):.3f} of an image; "
        f"{config.classifier.name} fine-tuned for {config.steps} steps; weight {config.weight}; "
        "mean over images with 95% bootstrap interval."
    )
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "difference")
