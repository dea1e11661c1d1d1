"""Find concepts in a backbone's feature maps, and make a sheet for each.

python experiments/concepts.py checkpoint=RUN data=imagenette data.root=PATH method=dictionary

The concepts go to `output`/concepts.safetensors, for experiments/steering.py; a sheet shows the
images in which a concept is strongest and where, which classes use it, and what removing it does to
their logits.
"""

from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

import harness
from featinv.analysis.concepts import find_concepts, importance
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import see
from featinv.evaluation.figures import gallery_figure, heat_over, save_figure
from featinv.evaluation.tables import markdown_table
from featinv.utils.errors import at_least
from featinv.utils.files import write_text
from settings import open_model


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


def sheet_figure(images: Tensor, presence: Tensor, classes: Tensor, number: int, title: str):
    """Draw the images with most of a concept, and where it is in them.

    Args:
        images: uint8, shape (N, 3, H, W).
        presence: Of the concept, shape (N, h, w).
        classes: What the backbone says of the images, shape (N,).
        number: How many images.
        title: Written above.
    """
    strength = presence.mean(dim=(1, 2))
    top = strength.topk(min(number, len(images))).indices.tolist()
    largest = float(presence[top].max())
    heat = [heat_over(images[i], presence[i], largest) for i in top]
    captions = [f"{strength[i]:.2f}, class {classes[i]}" for i in top]
    pictures = [[images[i] for i in top], heat]
    return gallery_figure(pictures, captions=[captions, [""] * len(top)], title=title)


def main(config: DictConfig) -> None:
    """Find, save, and write a sheet for each concept."""
    at_least("num_concepts", config.num_concepts, 1)
    model, output = open_model(config.checkpoint, config), Path(config.output)
    model.backbone.check_classifies()
    images = harness.load_images(config, model)["image"]
    features, logits = see(model.backbone, images)
    layer = f"{model.backbone.name} {model.backbone.layer}"
    concepts = find_concepts(features, config.method, config.num_concepts, config.seed, layer)
    concepts.save(output / "concepts.safetensors")
    presence, classes = concepts.presence(features), logits.argmax(dim=1)  # (N, K, h, w), (N,)
    falls = importance(model.backbone, concepts, features, presence, classes)  # (N, K)
    rows, sheets = [], [f"# {len(concepts)} concepts of {layer}, by {config.method}\n"]
    for k in range(len(concepts)):
        title = f"concept {k} of {layer}: the images with most of it"
        figure = sheet_figure(images, presence[:, k], classes, config.num_pictures, title)
        save_figure(figure, output / f"concept_{k}.png")
        strength = presence[:, k].mean(dim=(1, 2))
        own = sheet_rows(strength, falls[:, k], classes, config.num_classes)
        sheets.append(f"## Concept {k}\n\n![](concept_{k}.png)\n\n{markdown_table(own)}")
        rows += [{"concept": str(k)} | row for row in own]
    write_text(output / "sheets.md", "\n".join(sheets))
    about = f"{layer}, by {config.method}; {len(images)} images, seed {config.seed}."
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "concepts")
