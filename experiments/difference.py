"""Draw what two classifiers disagree on: one that learned a shortcut, and its clean copy.

python experiments/difference.py data=imagenette data.root=PATH

Two copies of a classifier are fine-tuned on the same images in the same order. Each image has a
corner in the colour of a class; in every second one, of another class than its own. The clean copy
learns the image's class, the other copy the corner's. (A classifier that knows the classes already
would not learn a shortcut from corners that always agree with them.) Images that keep the clean
copy's features but move the other's should then differ in the corner. As a control, the clean copy
is compared with itself, which should show nothing.
"""

from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm.auto import tqdm

import harness
from drawing import in_chunks, load_images
from featinv import FeatInv
from featinv.analysis.difference import difference_map, draw_pairs, share_inside
from featinv.backbones import Backbone
from featinv.cli.app import open_model, run_entry_point, sampler_options
from featinv.evaluation.cache import load_or_make
from featinv.evaluation.figures import highlight
from featinv.evaluation.pairing import other_images
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8
from harness import Column
from settings import dependencies

NUM_CLASSES = 1000  # ImageNet's numbering
COLOURS = torch.rand(NUM_CLASSES, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
COLUMNS = {
    "follows": "predicts the corner's class (where it differs)",
    "difference": "difference (RMS of the 0..1 range)",
    "share": "share of it in the corner",
}


def paint(images: Tensor, classes: Tensor, size: int) -> Tensor:
    """Return images (B, 3, H, W) whose lower right corner has the colours of classes (B,)."""
    images = images.clone()
    images[:, :, -size:, -size:] = COLOURS[classes].to(images)[:, :, None, None]
    return images


def fine_tune(
    backbone: Backbone, batches: Iterable[dict], shortcut: bool, config: DictConfig
) -> Backbone:
    """Fine-tune a backbone in place, all but the statistics of its norms, and freeze it.

    With `shortcut` it learns the class of the corner instead of the image's.
    """
    backbone.requires_grad_(True)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=config.lr)
    bar = tqdm(batches, total=config.steps, desc="shortcut" if shortcut else "clean")
    for batch in bar:
        labels = batch["label"].to(backbone.device)
        even = torch.arange(len(labels), device=labels.device) % 2 == 0
        corners = torch.where(even, labels, labels.roll(len(labels) // 2))
        images = paint(from_uint8(batch["image"]).to(labels.device), corners, config.corner)
        loss = F.cross_entropy(backbone.classify(images), corners if shortcut else labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return backbone.requires_grad_(False)


def fine_tuned(name: str, config: DictConfig) -> Backbone:
    """Return the `"clean"` copy or the one with the `"shortcut"`, fine-tuned now or before."""
    backbone = instantiate(config.classifier).to(pick_device(config.device))

    def train() -> dict[str, Tensor]:
        torch.manual_seed(config.seed)
        data = instantiate(config.data, image_size=config.classifier.image_size)
        batches = islice(data.train_dataloader(), config.steps)
        return fine_tune(backbone, batches, name == "shortcut", config).state_dict()

    names = ["classifier", "data", "steps", "lr", "corner", "seed"]
    wanted = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=True)
    backbone.load_state_dict(
        load_or_make(Path(config.output, f"{name}.safetensors"), wanted, train)
    )
    return backbone.requires_grad_(False)


@torch.no_grad()
def follows_corner(backbone: Backbone, images: Tensor, labels: Tensor, size: int) -> Tensor:
    """Return whether the predicted class is the corner's, for corners of another class."""
    corners = labels[other_images(labels.tolist())]
    predicted = backbone.classify(paint(images, corners, size)).argmax(1)
    return (predicted == corners)[corners != labels].float()


def compare(
    model: FeatInv, clean: Backbone, other: Backbone, images: dict, config: DictConfig
) -> dict[str, Tensor]:
    """Draw what another classifier looks at and the clean one does not, in painted images.

    Returns `difference`, and its `share` in the corner, each (N,); `follows`, see `follows_corner`;
    `map`, (N, H, W); and the first samples of `kept` and `moved`, uint8.
    """
    whole, labels = images["image"].to(model.device), images["label"].to(model.device)

    def draw(rows: Tensor) -> dict[str, Tensor]:
        values = (config.weight, config.num_samples, config.seed, images["index"][rows].tolist())
        drawn = draw_pairs(model, whole[rows], clean, other, *values, **sampler_options(config))
        kept, moved = (eight_bit(part.cpu()) for part in drawn)
        pictures = {"kept": to_uint8(kept[:, 0]), "moved": to_uint8(moved[:, 0])}
        return {"map": difference_map(kept, moved)} | pictures

    found = in_chunks(images, config, draw)
    corner = torch.zeros(found["map"].shape[1:], dtype=torch.bool)
    corner[-config.corner :, -config.corner :] = True
    return {
        "follows": follows_corner(other, whole, labels, config.corner).cpu(),
        "difference": found["map"].mean(dim=(1, 2)).clamp(min=0).sqrt(),
        "share": share_inside(found["map"], corner),
        **{name: found[name] for name in ("map", "kept", "moved")},
    }


def main(config: DictConfig) -> None:
    """Fine-tune both classifiers, draw what they disagree on, write table and figure."""
    for name, least in {"steps": 1, "corner": 1, "num_samples": 2}.items():
        at_least(name, config[name], least)
    model = open_model(config.checkpoint, config)
    if config.corner >= model.image_size:
        raise InputError(
            f"corner is {config.corner}, expected less than the {model.image_size} pixels of an "
            "image."
        )
    images = load_images(config, model)
    if len(images["label"].unique()) < 2:
        raise InputError(
            f"The {len(images['label'])} images are of one class or without labels: expected "
            "several classes, for example data=imagenette num_images=32."
        )
    small = resize(from_uint8(images["image"]), model.image_size)
    images["image"] = paint(small, images["label"], config.corner)
    clean, shortcut = (fine_tuned(name, config) for name in ("clean", "shortcut"))
    others = {"itself": clean, "the shortcut": shortcut}
    rows = {k: partial(compare, model, clean, other, images, config) for k, other in others.items()}
    names = ("weight", "corner", "classifier", "steps", "lr")
    results = harness.measure(rows, dependencies(config, config.checkpoint, *names), config)
    originals, found = to_uint8(images["image"]), results["the shortcut"]
    pairs = zip(originals, found["map"], strict=True)
    columns = [
        Column("original", originals),
        Column("keeps both", found["kept"]),
        Column("moves the shortcut", found["moved"]),
        Column("where they differ", [highlight(x, heat, float(heat.max())) for x, heat in pairs]),
    ]
    harness.save_pictures(columns, f"{config.output}/difference.png")
    about = (
        f"{len(small)} images, {config.num_samples} pairs each, seed {config.seed}; the corner of "
        f"{config.corner} px is {(config.corner / model.image_size) ** 2:.3f} of an image; "
        f"{config.classifier.name} fine-tuned for {config.steps} steps; weight {config.weight}; "
        "mean over images with 95% bootstrap interval."
    )
    numbers = {name: {key: values[key] for key in COLUMNS} for name, values in results.items()}
    table = harness.interval_rows(results, COLUMNS, "clean copy against")
    harness.publish(table, about, config, numbers)


if __name__ == "__main__":
    run_entry_point(main, "difference")
