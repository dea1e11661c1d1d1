"""Find concepts in a backbone's feature maps, and make a sheet for each.

python experiments/concepts.py checkpoint=RUN data=imagenette data.root=PATH method=dictionary

The concepts go to `output`/concepts.safetensors, for experiments/steering.py; a sheet shows the
images in which a concept is strongest and where, which classes use it, and what removing it does to
their logits.
"""

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

from featinv import FeatInv
from featinv.analysis.concepts import Concepts, find_concepts
from featinv.analysis.edits import steer
from featinv.backbones import Backbone
from featinv.cli.app import command, log_table, make_batches, run_entry_point
from featinv.evaluation.figures import gallery_figure, heat_over, save_figure
from featinv.evaluation.tables import markdown_table
from featinv.utils.devices import pick_device
from featinv.utils.errors import at_least
from featinv.utils.pixels import from_uint8

log = logging.getLogger("concepts")


@torch.no_grad()
def read(backbone: Backbone, batches: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (uint8), features and logits of a data set."""
    images, features, logits = [], [], []
    for batch in tqdm(batches, unit="batch", desc="features"):
        seen = backbone.features_and_logits(from_uint8(batch["image"].to(backbone.mean.device)))
        images.append(batch["image"])
        features.append(seen[0].cpu())
        logits.append(seen[1].cpu())
    return torch.cat(images), torch.cat(features), torch.cat(logits)


@torch.no_grad()
def importance(
    backbone: Backbone, features: Tensor, presence: Tensor, concepts: Concepts, classes: Tensor
) -> Tensor:
    """Return how far an image's own logit falls when a concept is removed, shape (K, N).

    Args:
        backbone: Whose head continues from the features.
        features: Shape (N, C, h, w), of the last layer.
        presence: Shape (N, K, h, w).
        concepts: The K concepts.
        classes: Of which class the logit is, shape (N,).
    """
    device = backbone.mean.device

    def own(changed: Tensor) -> Tensor:
        logits = [backbone.logits(part.to(device)).cpu() for part in changed.split(64)]
        return torch.cat(logits).gather(1, classes[:, None])[:, 0]

    before = own(features)
    falls = [
        before - own(steer(features, presence[:, k], concepts.directions[k], 0.0))
        for k in tqdm(range(len(concepts)), unit="concept", desc="importance")
    ]
    return torch.stack(falls)


def sheet_rows(presence: Tensor, falls: Tensor, classes: Tensor, limit: int) -> list[dict]:
    """Return the classes that use a concept most, as a table.

    Args:
        presence: Of the concept in each image, mean over positions, shape (N,).
        falls: From `importance`, shape (N,).
        classes: What the backbone says of the images, shape (N,).
        limit: How many classes.
    """
    rows = []
    for label in classes.unique().tolist():
        own = classes == label
        rows.append((float(presence[own].mean()), label, int(own.sum()), float(falls[own].mean())))
    return [
        {
            "class": str(label),
            "images": str(number),
            "mean presence": f"{mean:.3f}",
            "fall of its logit without the concept": f"{fall:.3f}",
        }
        for mean, label, number, fall in sorted(rows, reverse=True)[:limit]
    ]


def main(config: DictConfig) -> None:
    """Find, save, and write a sheet for each concept."""
    at_least("num_concepts", config.num_concepts, 1)
    model = FeatInv.load(config.checkpoint).to(pick_device(config.device))
    backbone = model.backbone
    images, features, logits = read(backbone, make_batches(config, model))
    layer = f"{backbone.name} {backbone.layer}"
    concepts = find_concepts(features, config.method, config.num_concepts, config.seed, layer)
    output = Path(config.output)
    concepts.save(output / "concepts.safetensors")
    presence = concepts.presence(features)  # (N, K, h, w)
    classes = logits.argmax(dim=1)
    falls = importance(backbone, features, presence, concepts, classes)
    pages = [f"# {len(concepts)} concepts of {layer}, by {config.method}\n"]
    everything = []
    for k in range(len(concepts)):
        strength = presence[:, k].mean(dim=(1, 2))
        top = strength.topk(min(config.num_pictures, len(images))).indices.tolist()
        largest = float(presence[top, k].max())
        heat = [heat_over(images[i], presence[i, k], largest) for i in top]
        captions = [f"{strength[i]:.2f}, class {classes[i]}" for i in top]
        figure = gallery_figure(
            [[images[i] for i in top], heat],
            captions=[captions, [""] * len(top)],
            title=f"concept {k} of {layer}: the images with most of it",
        )
        save_figure(figure, output / f"concept_{k}.png")
        rows = sheet_rows(strength, falls[k], classes, config.num_classes)
        everything += [{"concept": str(k)} | row for row in rows]
        pages.append(f"## Concept {k}\n\n![](concept_{k}.png)\n\n{markdown_table(rows)}")
    about = f"{len(images)} images, seed {config.seed}. Made by `{command()}`.\n"
    (output / "sheets.md").write_text("\n".join([*pages, about]))
    print(f"\n{pages[0]}{about}")
    log_table(everything, config)
    log.info("Concepts and their sheets are in %s", output)


if __name__ == "__main__":
    run_entry_point(main, "concepts")
