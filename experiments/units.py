"""Single features: set a position, a group of channels or one unit to zero, and see what changes.

python experiments/units.py checkpoint=RUN data=imagenette data.root=PATH

The same noise before and after, so that images differ by the edit only. How much of the change lies
where the position is, and whether the reconstruction's features changed as they were asked to, are
measured for every image.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor
from tqdm.auto import tqdm

from experiments.harness import draw, publish
from featinv import FeatInv
from featinv.analysis.edits import replace
from featinv.cli.app import make_batches, run_entry_point, sampler_options
from featinv.evaluation.figures import gallery_figure, save_figure
from featinv.evaluation.tables import format_interval, save_numbers
from featinv.metrics import bootstrap_interval
from featinv.models.base import Inverter
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import from_uint8, to_uint8

log = logging.getLogger("units")

Edit = Callable[[Tensor], tuple[Tensor, Tensor | None]]

COLUMNS = {
    "change": "change of a pixel",
    "inside": "inside the position / outside",
    "obtained": "share of the asked change",
    "edited": "cosine to the edited features",
    "original": "cosine to the original features",
    "probability": "change of the class's probability",
}


def edits(config: DictConfig, shape: tuple[int, int, int]) -> dict[str, Edit]:
    """Return name -> what edits features (B, C, h, w), and says at which positions (B, h, w).

    An edit of all positions says None.

    Args:
        config: `value`, `positions`, `channels`, `unit`.
        shape: Of the features, (C, h, w).

    Raises:
        InputError: There is no edit, no such position, or a share out of range.
    """
    num_channels, height, width = shape
    made: dict[str, Edit] = {}
    named = {"centre": (height // 2, width // 2), "corner": (0, 0)}
    if config.positions is not None:
        named = {f"position {row}, {column}": (row, column) for row, column in given(config)}
    for name, position in named.items():
        replace(torch.zeros(1, *shape), positions=[position])  # refuses what there is not
        made[name] = lambda features, p=position: at_position(features, p, config.value)
    if config.channels is not None:
        if not 0 < config.channels <= 1:
            raise InputError(
                f"channels is {config.channels}, expected a share above 0 and up to 1, for example "
                "0.05, or null."
            )
        number = max(1, round(config.channels * num_channels))
        made[f"{number} channels"] = lambda features: (
            at_channels(features, number, config.value),
            None,
        )
    if config.unit:
        made["unit"] = lambda features: at_unit(features, config.value)
    if not made:
        raise InputError("There is nothing to edit: expected positions, channels or unit=true.")
    return made


def given(config: DictConfig) -> list[list[int]]:
    """Return the positions that the config names, each a row and a column."""
    positions = OmegaConf.to_container(ListConfig(config.positions))
    for position in positions:
        if not isinstance(position, list) or [type(number) for number in position] != [int, int]:
            raise InputError(
                f"positions is {positions}: expected [[row, column], ...], for example [[0, 0]]."
            )
    return positions


def at_position(features: Tensor, position: tuple[int, int], value: float) -> tuple[Tensor, Tensor]:
    """Set all channels at a position to a value."""
    where = torch.zeros(len(features), *features.shape[2:], dtype=torch.bool)
    where[:, position[0], position[1]] = True
    return replace(features, value, positions=[position]), where


def at_channels(features: Tensor, number: int, value: float) -> Tensor:
    """Set so many channels, those of the largest mean magnitude in the image, to a value."""
    strongest = features.abs().mean(dim=(2, 3)).topk(number).indices.tolist()
    edited = [
        replace(image[None], value, channels=channels)
        for image, channels in zip(features, strongest, strict=True)
    ]
    return torch.cat(edited)


def at_unit(features: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """Set the feature of the largest magnitude in the image, at one position, to a value."""
    where = torch.zeros(len(features), *features.shape[2:], dtype=torch.bool)
    edited = []
    for i, image in enumerate(features):
        unit = torch.unravel_index(image.abs().argmax(), image.shape)
        channel, row, column = (int(number) for number in unit)
        edited.append(replace(image[None], value, [channel], [(row, column)]))
        where[i, row, column] = True
    return torch.cat(edited), where


def locality(change: Tensor, where: Tensor) -> Tensor:
    """Return the mean change inside the positions' part of the image over that outside.

    Args:
        change: Of the pixels, shape (B, H, W).
        where: Positions, bool, shape (B, h, w).

    Returns:
        Shape (B,); 1 where the change is the same everywhere.
    """
    inside = F.interpolate(where[:, None].float(), change.shape[1:], mode="nearest-exact")[:, 0]
    outside = 1 - inside

    def mean(weight: Tensor) -> Tensor:
        return (weight * change).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)

    return mean(inside) / mean(outside).clamp(min=1e-6)


def map_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of whole feature maps, shape (B,).

    `spatial_cosine` would count a position that was set to zero as a failure, whatever is drawn.
    """
    return F.cosine_similarity(a.flatten(1), b.flatten(1))


@torch.no_grad()
def measure(
    model: Inverter, batch: dict, changes: dict[str, Edit], config: DictConfig
) -> dict[str, dict[str, Tensor]]:
    """Invert the features of a batch before and after each edit.

    Args:
        model: Draws.
        batch: Of a data module.
        changes: From `edits`.
        config: `num_samples`, `seed`, `batch_size`, `sampler`.

    Returns:
        Name of the edit -> `drawn` (uint8, (B, 3, H, W), the first samples), and `COLUMNS`, each
        (B,), the mean over samples, but no `inside` for an edit of all positions; and so for
        `"before"`, with `drawn` only.
    """
    number = config.num_samples
    features, logits = model.backbone.features_and_logits(
        from_uint8(batch["image"].to(model.device))
    )
    best = logits.argmax(1).repeat_interleave(number)[:, None]

    def look(asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (B S, 3, H, W), their features, and the class's probabilities."""
        drawn = draw(model, asked, batch["index"], config).flatten(0, 1)
        seen, seen_logits = model.backbone.features_and_logits(drawn)
        return drawn, seen, seen_logits.softmax(1).gather(1, best)[:, 0]

    before, seen_before, probability = look(features)
    results = {"before": {"drawn": to_uint8(before[::number]).cpu()}}
    for name, edit in tqdm(changes.items(), unit="edit", desc="edits", leave=False):
        edited, where = edit(features)
        after, seen, after_probability = look(edited)
        pixels = (after - before).abs().mean(dim=1) / 2  # (B S, H, W), of the 0..1 pixel range
        original, asked = (x.repeat_interleave(number, 0) for x in (features, edited))
        step, wanted = (seen - seen_before).flatten(1), (asked - original).flatten(1)
        values = {
            "change": pixels.mean(dim=(1, 2)),
            # how far the features went in the direction that was asked for; 1 is all the way
            "obtained": (step * wanted).sum(1) / wanted.square().sum(1).clamp(min=1e-12),
            "edited": map_cosine(asked, seen),
            "original": map_cosine(original, seen),
            "probability": after_probability - probability,
        }
        if where is not None:
            where = where.to(model.device).repeat_interleave(number, 0)
            values["inside"] = locality(pixels, where)
        values = {key: value.view(-1, number).mean(1).cpu() for key, value in values.items()}
        results[name] = {"drawn": to_uint8(after[::number]).cpu()} | values
    return results


def table_rows(results: dict[str, dict[str, Tensor]]) -> list[dict[str, str]]:
    """Return the table, as text; an edit of all positions has no inside."""
    rows = []
    for name, values in results.items():
        if name != "before":
            cells = {
                title: format_interval(float(values[key].mean()), *bootstrap_interval(values[key]))
                for key, title in COLUMNS.items()
                if key in values
            }
            rows.append({"set to another value": name} | cells)
    return rows


def figure(originals: Tensor, results: dict[str, dict[str, Tensor]], number: int, title: str):
    """Draw originals, reconstructions before and after each edit, and what differs.

    The differences of a row are as bright as each other, white from their 99th percentile on.
    """
    edited = {name: values for name, values in results.items() if name != "before"}
    pictures, captions = [], []
    for i in range(number):
        before = results["before"]["drawn"][i]
        after = torch.stack([values["drawn"][i] for values in edited.values()])
        difference = (after.int() - before.int()).abs().amax(1, keepdim=True)  # (E, 1, H, W)
        white = difference.float().quantile(0.99).clamp(min=1)
        shown = (255 * difference / white).clamp(max=255).byte().expand(-1, 3, -1, -1)
        pairs = zip(after, shown, strict=True)
        pictures.append([originals[i], before, *(picture for pair in pairs for picture in pair)])
        changes = (("", f"mean {values['change'][i]:.3f}") for values in edited.values())
        captions.append(["", "", *(text for pair in changes for text in pair)])
    columns = ["original", "before"] + [text for name in edited for text in (name, "difference")]
    return gallery_figure(pictures, columns=columns, captions=captions, title=title)


def main(config: DictConfig) -> None:
    """Edit every image in every way, write table and figure."""
    for name in ("num_samples", "num_pictures"):
        at_least(name, config[name], 1)
    model = FeatInv.load(config.checkpoint).to(pick_device(config.device))
    changes = edits(config, model.backbone.feature_shape)
    originals, parts = [], []
    for batch in tqdm(make_batches(config, model), unit="batch", desc="units"):
        originals.append(batch["image"])
        parts.append(measure(model, batch, changes, config))
    originals = torch.cat(originals)
    results = {
        name: {key: torch.cat([part[name][key] for part in parts]) for key in values}
        for name, values in parts[0].items()
    }
    output = Path(config.output)
    where = f"{model.backbone.name}, layer {model.backbone.layer}"
    number = min(config.num_pictures, len(originals))
    title = f"features of {where} set to {config.value:g}; same noise before and after"
    save_figure(figure(originals, results, number, title), output / "units.png")
    how = model.settings(**sampler_options(config)).describe()
    about = (
        f"Features of {where} set to {config.value:g}; {len(originals)} images, "
        f"{config.num_samples} sample(s) each, seed {config.seed}; {how}; mean over images with "
        "95% bootstrap interval. Pixels are in 0..1; cosines are of whole maps."
    )
    publish(table_rows(results), about, config)
    save_numbers({name: results[name] for name in changes}, output / "results.json")


if __name__ == "__main__":
    run_entry_point(main, "units")
