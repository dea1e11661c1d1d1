"""Find concepts in a backbone's feature maps, and make a sheet for each.

python experiments/concepts.py checkpoint=RUN data=imagenette data.root=PATH method=dictionary

The concepts go to `output`/concepts.safetensors, for experiments/steering.py. A concept's sheet
shows the images with most of it and where it is in them, which classes use it, and how far their
logits drop without it.
"""

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from torch import Tensor

import harness
from drawing import load_images
from featinv.analysis.concepts import find_concepts, importance
from featinv.cli.app import open_model, run_entry_point
from featinv.evaluation.draws import extract
from featinv.evaluation.figures import gallery_figure, highlight, save_figure
from featinv.evaluation.tables import markdown_table
from featinv.utils.files import write_text


def sheet_rows(presence: Tensor, drops: Tensor, classes: Tensor, limit: int) -> list[dict]:
    """Return the predicted classes that use a concept most, as a table.

    All arguments have shape (N,): its mean presence, `importance`, and the classes.
    """
    images = pd.DataFrame({"label": classes, "presence": presence, "drop": drops})
    groups = images.groupby("label", as_index=False)
    table = groups.agg(
        number=("drop", "size"), presence=("presence", "mean"), drop=("drop", "mean")
    )
    table = table.sort_values(["presence", "label"], ascending=False)
    return [
        {
            "class": str(row.label),
            "images": str(row.number),
            "mean presence": f"{row.presence:.3f}",
            "drop of its logit without the concept": f"{row.drop:.3f}",
        }
        for row in table.head(limit).itertuples()
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
        present, path = presence[:, k], output / f"concept_{k}.png"
        title = f"concept {k} of {layer}: the images with most of it"
        save_sheet(images, present, classes, config.num_pictures, title, path)
        table = sheet_rows(present.mean(dim=(1, 2)), drops[:, k], classes, config.num_classes)
        sheets.append(f"## Concept {k}\n\n![]({path.name})\n\n{markdown_table(table)}")
        rows += [{"concept": str(k)} | row for row in table]
    write_text(output / "sheets.md", "\n".join(sheets))
    about = f"{layer}, by {config.method}; {len(images)} images, seed {config.seed}."
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "concepts")
