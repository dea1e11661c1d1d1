"""Find concepts in a backbone's feature maps, and make a sheet for each.

python experiments/concepts.py checkpoint=RUN data=imagenette data.root=PATH method=dictionary

The concepts go to `output`/concepts.safetensors, for experiments/steering.py. A concept's sheet
shows the images with most of it and where it is in them, which classes use it, and how far their
logits drop without it.
"""

from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

import harness
from drawing import load_images
from featinv.analysis.concepts import find_concepts, importance
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import extract
from featinv.evaluation.figures import gallery_figure, highlight, save_figure
from featinv.evaluation.tables import markdown_table
from featinv.utils.files import write_text
from settings import open_model


def sheet_rows(presence: Tensor, drops: Tensor, classes: Tensor, limit: int) -> list[dict]:
    """Return the predicted classes that use a concept most, as a table.

    All arguments have shape (N,): its mean presence, `importance`, and the classes.
    """
    groups = {int(label): classes == label for label in classes.unique()}
    means = {label: float(presence[own].mean()) for label, own in groups.items()}
    return [
        {
            "class": str(label),
            "images": str(int(groups[label].sum())),
            "mean presence": f"{means[label]:.3f}",
            "drop of its logit without the concept": f"{float(drops[groups[label]].mean()):.3f}",
        }
        for label in sorted(means, key=lambda label: (means[label], label), reverse=True)[:limit]
    ]


def save_sheet(
    images: Tensor, presence: Tensor, classes: Tensor, number: int, title: str, path: Path
) -> None:
    """Draw the images with most of a concept, whose presence is (N, h, w), and where it is."""
    strength = presence.mean(dim=(1, 2))
    top = strength.topk(min(number, len(images))).indices
    largest = float(presence[top].max())
    heat = [highlight(images[i], presence[i], largest) for i in top]
    captions = [f"{strength[i]:.2f}, class {classes[i]}" for i in top]
    pictures, captions = [list(images[top]), heat], [captions, [""] * len(top)]
    save_figure(gallery_figure(pictures, captions=captions, title=title), path)


def main(config: DictConfig) -> None:
    """Find the concepts, write them, their sheets and the table."""
    model, output = open_model(config.checkpoint, config), Path(config.output)
    backbone = model.backbone
    backbone.check_classifies()
    images = load_images(config, model)["image"]
    features, logits = extract(backbone, images)
    layer, classes = f"{backbone.name} {backbone.layer}", logits.argmax(dim=1)
    concepts = find_concepts(features, config.method, config.num_concepts, config.seed, layer)
    concepts.save(output / "concepts.safetensors")
    presence = concepts.presence(features)  # (N, K, h, w)
    drops = importance(backbone, concepts, features, presence, classes)  # (N, K)
    rows, sheets = [], [f"# {len(concepts)} concepts of {layer}, by {config.method}\n"]
    for k in range(len(concepts)):
        own, path = presence[:, k], output / f"concept_{k}.png"
        title = f"concept {k} of {layer}: the images with most of it"
        save_sheet(images, own, classes, config.num_pictures, title, path)
        table = sheet_rows(own.mean(dim=(1, 2)), drops[:, k], classes, config.num_classes)
        sheets.append(f"## Concept {k}\n\n![]({path.name})\n\n{markdown_table(table)}")
        rows += [{"concept": str(k)} | row for row in table]
    write_text(output / "sheets.md", "\n".join(sheets))
    about = f"{layer}, by {config.method}; {len(images)} images, seed {config.seed}."
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "concepts")
