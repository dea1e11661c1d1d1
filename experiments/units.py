"""Single features: set a position, a group of channels or one unit to zero, and see what changes.

python experiments/units.py checkpoint=RUN data=imagenette data.root=PATH

Draws before and after share their noise, so they differ by the edit only. For every image the table
measures how much of the change lies where the position is, and whether the reconstruction's
features changed as the edit wants.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

import harness
from drawing import draw_samples, in_chunks, load_images
from featinv.analysis.edits import strongest_channels, strongest_unit
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import Draws, extract
from featinv.models.base import Inverter
from featinv.utils.errors import InputError
from harness import Column
from settings import dependencies, open_checkpoint

COLUMNS = {
    "change": "change of a pixel",
    "inside": "change inside / outside the position",
    "obtained": "share of the wanted change",
    "edited": "cosine to the edited features",
    "original": "cosine to the original features",
    "probability": "change of the class's probability",
}


def choices(
    config: DictConfig, shape: tuple[int, int, int]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return name -> function of features (B, C, h, w): which of them to set, bool, same shape."""
    num_channels, height, width = shape
    made = {}
    named = {"centre": (height // 2, width // 2), "corner": (0, 0)}
    if config.positions is not None:
        try:
            named = {f"position {row}, {column}": (row, column) for row, column in config.positions}
        except (TypeError, ValueError) as error:
            raise InputError(
                f"positions is {config.positions}: expected [[row, column], ...], for example "
                "[[0, 0]]."
            ) from error
    for name, (row, column) in named.items():
        if not (0 <= row < height and 0 <= column < width):
            raise InputError(
                f"There is no position {row}, {column}: expected rows 0 to {height - 1} and "
                f"columns 0 to {width - 1}."
            )
        mask = torch.zeros(1, *shape, dtype=torch.bool)
        mask[:, :, row, column] = True
        made[name] = mask.expand_as
    if config.channels is not None:
        number = harness.count("channels", config.channels, num_channels)
        made[f"{number} channels"] = partial(strongest_channels, number=number)
    if config.unit:
        made["unit"] = strongest_unit
    if not made:
        raise InputError("There is nothing to edit: expected positions, channels or unit=true.")
    return made


def map_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine (B,) of whole maps (B, C, h, w), which ignores positions that are zero."""
    return F.cosine_similarity(a.float().flatten(1), b.float().flatten(1))


def obtained_share(change: Tensor, wanted: Tensor) -> Tensor:
    """Project a change of features on the wanted one, both (B, C, h, w): 1 for all of it, (B,)."""
    along = (change * wanted).flatten(1).sum(dim=1)
    return along / wanted.square().flatten(1).sum(dim=1).clamp(min=1e-12)


def locality(change: Tensor, where: Tensor) -> Tensor:
    """Return the mean change of the pixels under edited positions over that of all others.

    Args:
        change: Of each pixel, shape (B, H, W).
        where: Edited positions of the feature map, bool, shape (B, h, w).

    Returns:
        Shape (B,): 1 if the image changes equally everywhere.
    """
    inside = F.interpolate(where[:, None].float(), change.shape[1:], mode="nearest-exact")[:, 0]

    def mean(weight: Tensor) -> Tensor:
        return (weight * change).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)

    return mean(inside) / mean(1 - inside).clamp(min=1e-6)


def grid(model: Inverter, images: dict, config: DictConfig) -> dict:
    """Return name -> function that inverts all images' features before and after an edit.

    It returns `before` and `after`, the first samples, uint8, (N, 3, H, W), and `COLUMNS`, each
    (N,), without `inside` if all positions are edited.
    """
    features, logits = extract(model.backbone, images["image"])

    @cache  # the same for all edits
    def unedited(rows: range) -> Draws:
        return draw_samples(model, features[rows], images["index"][rows], config)

    def edit(choose: Callable[[Tensor], Tensor], rows: Tensor) -> dict[str, Tensor]:
        original, classes = (x[rows].to(model.device) for x in (features, logits.argmax(1)))
        chosen = choose(original).to(model.device)
        edited = original.masked_fill(chosen, config.value)
        before = unedited(range(int(rows[0]), int(rows[-1]) + 1))
        after = draw_samples(model, edited, images["index"][rows], config)
        pixels = (after.images - before.images).abs().mean(dim=1) / 2  # (B S, H, W), of 0..1
        got, wanted = after.features - before.features, after.repeat(edited - original)
        values = {
            "before": before.first(),
            "after": after.first(),
            "change": after.mean(pixels.mean(dim=(1, 2))),
            "obtained": after.mean(obtained_share(got, wanted)),
            "edited": after.mean(map_cosine(after.repeat(edited), after.features)),
            "original": after.mean(map_cosine(after.repeat(original), after.features)),
            "probability": after.probability(classes) - before.probability(classes),
        }
        where = chosen.any(dim=1)  # (B, h, w)
        if not where.all():
            values["inside"] = after.mean(locality(pixels, after.repeat(where)))
        return values

    made = choices(config, model.backbone.feature_shape)
    return {
        name: partial(in_chunks, images, config, partial(edit, choose))
        for name, choose in made.items()
    }


def figure_columns(originals: Tensor, results: harness.Results) -> list[Column]:
    """Return originals, reconstructions before and after each edit, and their differences.

    All differences of an image have one scale, on which their 99th percentile is white.
    """
    before = next(iter(results.values()))["before"]
    after = torch.stack([values["after"] for values in results.values()])  # (E, N, 3, H, W)
    difference = (after.int() - before.int()).abs().amax(2, keepdim=True).float()
    white = difference.transpose(0, 1).flatten(1).quantile(0.99, dim=1).clamp(min=1)
    shown = (255 * difference / white.view(-1, 1, 1, 1)).clamp(max=255).byte()
    columns = [Column("original", originals), Column("before", before)]
    for i, (name, values) in enumerate(results.items()):
        changes = [f"mean {change:.3f}" for change in values["change"]]
        columns.append(Column(name, after[i]))
        columns.append(Column("difference", shown[i].expand(-1, 3, -1, -1), changes))
    return columns


def main(config: DictConfig) -> None:
    """Edit every image in every way, write table and figure."""
    model, sampling = open_checkpoint(config)
    model.backbone.check_classifies()
    images = load_images(config, model)
    depends_on = dependencies(config, config.checkpoint, "value")
    results = harness.measure(grid(model, images, config), depends_on, config)
    what = f"{model.backbone.name}, layer {model.backbone.layer} set to {config.value:g}"
    title = f"features of {what}; same noise before and after"
    columns = figure_columns(images["image"], results)
    harness.save_pictures(columns, f"{config.output}/units.png", title)
    about = (
        f"Features of {what}; "
        f"{harness.measured_caption(len(images['image']), config, sampling)} Pixels are in 0..1; "
        "cosines are of whole maps."
    )
    rows = harness.interval_rows(results, COLUMNS, "edit")
    harness.publish(rows, about, config, results)


if __name__ == "__main__":
    run_entry_point(main, "units")
