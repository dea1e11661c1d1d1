"""Single features: set a position, a group of channels or one unit to zero, and see what changes.

python experiments/units.py checkpoint=RUN data=imagenette data.root=PATH

The same noise before and after, so that images differ by the edit only. How much of the change lies
where the position is, and whether the reconstruction's features changed as the edit wants, are
measured for every image.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

import harness
from featinv.analysis.edits import replace, strongest_channels, strongest_unit
from featinv.analysis.effects import locality, map_cosine, obtained_share
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import Draws, see
from featinv.evaluation.figures import gallery_figure, save_figure
from featinv.models.base import Inverter
from featinv.utils.errors import InputError, at_least
from settings import Setting, dependencies, open_setting

Choice = Callable[[Tensor], Tensor]  # features (B, C, h, w) -> which to set, bool, same shape

COLUMNS = {
    "change": "change of a pixel",
    "inside": "inside the position / outside",
    "obtained": "share of the wanted change",
    "edited": "cosine to the edited features",
    "original": "cosine to the original features",
    "probability": "change of the class's probability",
}


def choices(config: DictConfig, shape: tuple[int, int, int]) -> dict[str, Choice]:
    """Return name -> which features are set to the value.

    Args:
        config: `positions`, `channels`, `unit`.
        shape: Of the features, (C, h, w).

    Raises:
        InputError: There is none, no such position, or a share out of range.
    """
    num_channels, height, width = shape
    made: dict[str, Choice] = {}
    named = {"centre": (height // 2, width // 2), "corner": (0, 0)}
    if config.positions is not None:
        try:
            named = {f"position {row}, {column}": (row, column) for row, column in config.positions}
        except (TypeError, ValueError) as error:
            raise InputError(
                f"positions is {config.positions}: expected [[row, column], ...], for example "
                "[[0, 0]]."
            ) from error
    for name, position in named.items():
        mask = replace(torch.zeros(1, *shape), 1.0, positions=[position]).bool()
        made[name] = mask.expand_as
    if config.channels is not None:
        if not 0 < config.channels <= 1:
            raise InputError(
                f"channels is {config.channels}, expected a share above 0 and up to 1, for example "
                "0.05, or null."
            )
        number = max(1, round(config.channels * num_channels))
        made[f"{number} channels"] = partial(strongest_channels, number=number)
    if config.unit:
        made["unit"] = strongest_unit
    if not made:
        raise InputError("There is nothing to edit: expected positions, channels or unit=true.")
    return made


def grid(
    model: Inverter, images: dict, config: DictConfig
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Return name -> what inverts the features of all images before and after an edit.

    That gives `before` and `after`, the first samples, uint8, (N, 3, H, W); and `COLUMNS`, each
    (N,), but no `inside` for an edit of all positions.
    """
    features, logits = see(model.backbone, images["image"])

    @cache  # the same for all edits
    def unedited(first: int, last: int) -> Draws:
        indices = images["index"][first:last]
        return harness.draw_samples(model, features[first:last], indices, config)

    def row(choose: Choice) -> dict[str, Tensor]:
        def rows(chunk: Tensor) -> dict[str, Tensor]:
            original, classes = (x[chunk].to(model.device) for x in (features, logits.argmax(1)))
            chosen = choose(original).to(model.device)
            edited = original.masked_fill(chosen, config.value)
            before = unedited(int(chunk[0]), int(chunk[-1]) + 1)
            after = harness.draw_samples(model, edited, images["index"][chunk], config)
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

        return harness.in_chunks(len(features), config, rows)

    made = choices(config, model.backbone.feature_shape)
    return {name: partial(row, choose) for name, choose in made.items()}


def units_figure(originals: Tensor, results: dict[str, dict[str, Tensor]], title: str) -> Figure:
    """Draw originals, reconstructions before and after each edit, and what differs.

    The differences of a row are as bright as each other, white from their 99th percentile on.
    """
    pictures, captions = [], []
    for i, original in enumerate(originals):
        before = next(iter(results.values()))["before"][i]
        after = torch.stack([values["after"][i] for values in results.values()])
        difference = (after.int() - before.int()).abs().amax(1, keepdim=True)  # (E, 1, H, W)
        white = difference.float().quantile(0.99).clamp(min=1)
        shown = (255 * difference / white).clamp(max=255).byte().expand(-1, 3, -1, -1)
        pairs = zip(after, shown, strict=True)
        pictures.append([original, before, *(picture for pair in pairs for picture in pair)])
        changes = (("", f"mean {values['change'][i]:.3f}") for values in results.values())
        captions.append(["", "", *(text for pair in changes for text in pair)])
    columns = ["original", "before"] + [text for name in results for text in (name, "difference")]
    return gallery_figure(pictures, columns=columns, captions=captions, title=title)


def main(config: DictConfig) -> None:
    """Edit every image in every way, write table and figure."""
    for name in ("num_samples", "num_pictures"):
        at_least(name, config[name], 1)
    model, config, sampling = open_setting(Setting("checkpoint", config.checkpoint), config)
    model.backbone.check_classifies()
    images = harness.load_images(config, model)
    depends_on = dependencies(config, config.checkpoint, "value")
    results = harness.measure(grid(model, images, config), depends_on, config)
    where = f"{model.backbone.name}, layer {model.backbone.layer}"
    title = f"features of {where} set to {config.value:g}; same noise before and after"
    figure = units_figure(images["image"][: config.num_pictures], results, title)
    save_figure(figure, Path(config.output) / "units.png")
    about = (
        f"Features of {where} set to {config.value:g}; "
        f"{harness.measured_caption(len(images['image']), config, sampling)} Pixels are in 0..1; "
        "cosines are of whole maps."
    )
    rows = harness.interval_rows(results, COLUMNS, "set to another value", images["photograph"])
    harness.publish_measured(rows, results, about, config)


if __name__ == "__main__":
    run_entry_point(main, "units")
