"""What two classifiers disagree on, drawn: one that learnt a shortcut, and its clean copy.

python experiments/difference.py data=imagenette data.root=PATH

Two copies of a classifier are fine-tuned on the same images in the same order. All have a corner in
the colour of a class, in every second one of another class than its own. The clean copy learns the
image's class, the other one the colour's: a classifier that knows the classes already would learn
no shortcut from corners that always agree with it. Where images differ that keep the clean copy's
features and move the other's should then be the corner. Beside it stands what the clean copy makes
of itself, which should be nothing.
"""

from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm.auto import tqdm

import harness
from featinv import FeatInv
from featinv.analysis.calibration import other_images
from featinv.analysis.difference import difference_map, draw_pairs, share
from featinv.backbones import Backbone
from featinv.cli.app import run_entry_point, sampler_options
from featinv.evaluation.figures import gallery_figure, heat_over, save_figure
from featinv.evaluation.kept import keep
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8
from settings import dependencies, open_model

NUM_CLASSES = 1000  # ImageNet's numbering
COLOURS = torch.rand(NUM_CLASSES, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


def paint(images: Tensor, classes: Tensor, size: int) -> Tensor:
    """Return images (B, 3, H, W) whose lower right corner has the colours of classes (B,)."""
    images = images.clone()
    images[:, :, -size:, -size:] = COLOURS[classes].to(images)[:, :, None, None]
    return images


def corner_classes(labels: Tensor) -> Tensor:
    """Return the classes of the corners of a batch: every second one is that of another image."""
    own = torch.arange(len(labels), device=labels.device) % 2 == 0
    return torch.where(own, labels, labels.roll(len(labels) // 2))


def fine_tune(
    backbone: Backbone, batches: Iterable[dict], shortcut: bool, config: DictConfig
) -> Backbone:
    """Fine-tune a backbone's network in place, all but the statistics of its norms, and freeze it.

    Args:
        backbone: Its weights are where training starts.
        batches: Of a data module, as many as there are steps.
        shortcut: Whether it learns the class of the corner instead of the image's.
        config: `steps`, `lr`, `corner`.
    """
    backbone.requires_grad_(True)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=config.lr)
    bar = tqdm(batches, total=config.steps, desc="shortcut" if shortcut else "clean")
    for batch in bar:
        labels = batch["label"].to(backbone.mean.device)
        if (labels < 0).any():
            raise InputError("Images without labels teach no classes: expected data=imagenette.")
        classes = corner_classes(labels)
        images = paint(from_uint8(batch["image"]).to(labels.device), classes, config.corner)
        loss = F.cross_entropy(backbone.classify(images), classes if shortcut else labels)
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


def fine_tuned(name: str, config: DictConfig) -> Backbone:
    """Return the `"clean"` copy or that with the `"shortcut"`, fine-tuned now or before."""
    backbone = instantiate(config.classifier).to(pick_device(config.device))

    def train() -> dict[str, Tensor]:
        torch.manual_seed(config.seed)
        data = instantiate(config.data, image_size=config.classifier.image_size)
        batches = islice(data.train_dataloader(), config.steps)
        return fine_tune(backbone, batches, name == "shortcut", config).state_dict()

    names = ["classifier", "data", "steps", "lr", "corner", "seed"]
    wanted = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=True)
    state = keep(Path(config.output) / f"{name}.safetensors", wanted, train)
    backbone.load_state_dict(state)
    return backbone.requires_grad_(False)


def compare(
    model: FeatInv, clean: Backbone, other: Backbone, images: dict, config: DictConfig
) -> dict[str, Tensor]:
    """Draw what another classifier sees beside the clean one.

    Args:
        model: The prior.
        clean: The classifier whose features are kept.
        other: The one whose features are moved.
        images: A batch, whose `image` has its painted corner, in [-1, 1].
        config: The experiment's.

    Returns:
        `share` of the difference in the corner, `difference`, each (N,), `follows` as
        `follows_corner`, `map` (N, H, W), and the first sample of `kept` and `moved`, uint8.
    """
    device, corner = model.device, config.corner

    def draw(rows: Tensor) -> dict[str, Tensor]:
        own, numbers = images["image"][rows].to(device), images["index"][rows].tolist()
        how = (config.weight, config.num_samples, config.seed, numbers)
        drawn = draw_pairs(model, own, clean, other, *how, **sampler_options(config))
        kept, moved = (eight_bit(part.cpu()) for part in drawn)
        pictures = {"kept": to_uint8(kept[:, 0]), "moved": to_uint8(moved[:, 0])}
        return {"map": difference_map(kept, moved)} | pictures

    found = harness.in_chunks(len(images["image"]), config, draw)
    region = torch.zeros(found["map"].shape[1:], dtype=torch.bool)
    region[-corner:, -corner:] = True
    everything = images["image"].to(device), images["label"].to(device)
    return found | {
        "share": share(found["map"], region),
        "difference": found["map"].mean(dim=(1, 2)).clamp(min=0).sqrt(),
        "follows": follows_corner(other, *everything, corner).cpu(),
    }


def figure(images: Tensor, values: dict[str, Tensor]) -> Figure:
    """Draw originals, what keeps both classifiers' features, what moves one, and the difference."""
    rows = zip(*(values[key] for key in ("kept", "moved", "map")), strict=False)
    pictures = [
        [image, kept, moved, heat_over(image, heat, float(heat.max()))]
        for image, (kept, moved, heat) in zip(to_uint8(images), rows, strict=False)
    ]
    columns = ["original", "keeps both", "moves the shortcut", "where they differ"]
    return gallery_figure(pictures, columns=columns)


def main(config: DictConfig) -> None:
    """Fine-tune both classifiers, draw what they disagree on, write table and figure."""
    for name, least in {"steps": 1, "corner": 1, "num_samples": 2, "num_images": 1}.items():
        at_least(name, config[name], least)
    model = open_model(config.checkpoint, config)
    if config.corner >= model.image_size:
        raise InputError(
            f"corner is {config.corner}, expected less than the {model.image_size} pixels of an "
            "image."
        )
    batch = harness.load_images(config, model)
    small = resize(from_uint8(batch["image"]), model.image_size)
    batch["image"] = paint(small, batch["label"], config.corner)
    clean, shortcut = (fine_tuned(name, config) for name in ("clean", "shortcut"))
    others = {"itself": clean, "the shortcut": shortcut}
    rows = {k: partial(compare, model, clean, other, batch, config) for k, other in others.items()}
    own = ("weight", "corner", "classifier", "steps", "lr")
    results = harness.measure(rows, dependencies(config, config.checkpoint, *own), config)
    shown = batch["image"][: config.num_pictures]
    save_figure(figure(shown, results["the shortcut"]), Path(config.output) / "difference.png")
    columns = {
        "follows": "has the corner's class, where it is another",
        "difference": "difference (RMS of the 0..1 range)",
        "share": "share of it in the corner",
    }
    about = (
        f"{len(small)} images, {config.num_samples} pairs each, seed {config.seed}; the corner of "
        f"{config.corner} px is {(config.corner / model.image_size) ** 2:.3f} of an image; "
        f"{config.classifier.name} fine-tuned for {config.steps} steps; weight {config.weight}; "
        "mean over images with 95% bootstrap interval."
    )
    numbers = {name: {key: values[key] for key in columns} for name, values in results.items()}
    table = harness.interval_rows(results, columns, "clean copy against")
    harness.publish_measured(table, numbers, about, config)


if __name__ == "__main__":
    run_entry_point(main, "difference")
