"""Are samples as different as they should be? Calibration of a model by settings of its sampler.

python experiments/calibration.py checkpoint=RUN data=imagenette data.root=PATH

A ratio of 1 is calibrated, below 1 overconfident, above 1 underconfident
(`featinv/analysis/calibration.py`). It is measured in several spaces: pixels, the mean colours of
8x8 blocks, the model's latents, and the features of a classifier that took no part. The cosine
beside it shows which settings are merely pretty. In pixels the original counts as it is, so the
loss of a codec makes samples look overconfident; in the latents it does not.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

import harness
from drawing import draw_samples, in_chunks, load_images
from featinv import FeatInv
from featinv.analysis.calibration import calibrate, coverage, flatness, ratio_interval
from featinv.backbones import Backbone
from featinv.checkpoints import load_model
from featinv.cli.app import command, run_entry_point, sampler_options
from featinv.evaluation.figures import save_figure
from featinv.evaluation.pairing import other_images
from featinv.evaluation.plots import new_figure, style_axes
from featinv.evaluation.tables import format_interval
from featinv.evaluation.witnesses import load_witness
from featinv.models.base import Inverter
from featinv.utils.errors import at_least
from featinv.utils.files import write_text
from featinv.utils.pixels import eight_bit, from_uint8, resize
from settings import Setting, dependencies, find_settings, open_setting

Space = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] to points (B, ...)
Numbers = Mapping[str, Tensor]  # of `calibrate`, and `photograph`, each (N,)


def spaces(model: Inverter, witness: Backbone | None) -> dict[str, Space]:
    """Return the spaces in which images have a distance, by name."""
    found: dict[str, Space] = {
        "pixels": lambda images: images,
        "low pass": lambda images: F.avg_pool2d(images, 8),
    }
    if codec := getattr(model, "codec", None):
        found["latents"] = codec.encode
    if witness is not None:
        found["witness"] = witness.features
    return found


@torch.no_grad()
def measure(setting: Setting, config: DictConfig) -> dict[str, Tensor]:
    """Draw samples of every image.

    Returns:
        `cosine` and `photograph`, (N,), and in each space the numbers of `calibrate`, as
        `SPACE/NAME`.
    """
    model, config, _ = open_setting(setting, config)
    witness = None if config.witness is None else load_witness(config.witness, model)
    images = load_images(config, model)
    others = torch.tensor(other_images(images["label"].tolist()))
    originals = eight_bit(resize(from_uint8(images["image"]), model.image_size))

    def draw(rows: Tensor) -> dict[str, Tensor]:
        features = model.backbone.features(from_uint8(images["image"][rows].to(model.device)))
        indices = images["index"][rows]
        draws = draw_samples(model, features, indices, config)
        pictures = [originals[which].to(model.device) for which in (rows, others[rows])]
        found = {"cosine": draws.cosine(features)}
        for name, space in spaces(model, witness).items():
            samples = space(draws.images).unflatten(0, (len(rows), -1))
            numbers = calibrate(samples, *map(space, pictures), indices)
            found |= {f"{name}/{key}": values for key, values in numbers.items()}
        return found

    return in_chunks(images, config, draw)


def by_space(values: Numbers) -> dict[str, Numbers]:
    """Return space -> numbers of a setting, from what `measure` returned."""
    found = defaultdict(lambda: {"photograph": values["photograph"]})
    for name in values:
        if "/" in name:
            space, key = name.split("/")
            found[space][key] = values[name]
    return dict(found)


def ratio(numbers: Numbers) -> tuple[float, float, float]:
    """Return the calibration ratio in a space, and the ends of its interval."""
    return ratio_interval(*(numbers[key] for key in ("between", "to_original", "photograph")))


def table_row(
    measured: Mapping[str, Numbers], shared: Collection[str], num_samples: int
) -> dict[str, str]:
    """Return the cells of a setting, as text; see `off`."""
    cells = {f"ratio, {name}": format_interval(*ratio(n)) for name, n in measured.items()}
    cells["off by a factor of"] = f"{off(measured, shared):.3f}"
    for title, key in {"flat ranks": "ranks", "coverage": "reference_ranks"}.items():
        cells[f"{title}, pixels: p"] = f"{flatness(measured['pixels'][key], num_samples + 1):.2g}"
    return cells


def off(measured: Mapping[str, Numbers], shared: Collection[str]) -> float:
    """Return the factor by which ratios differ from 1, the geometric mean over shared spaces."""
    with np.errstate(divide="ignore"):  # identical samples are off by infinity
        logs = np.abs(np.log([ratio(measured[space])[0] for space in shared]))
    return float(np.exp(logs.mean()))


def write_sampler(setting: Setting, config: DictConfig) -> None:
    """Write the sampler of a setting to `calibrated.yaml`, an option for configs/sampler."""
    model, own, _ = open_setting(setting, config)
    values = asdict(model.settings(**sampler_options(own)))
    values = {"_target_": "featinv.sampling.SamplerConfig", **values}
    head = f"# Of the settings in {command()}\n# the one whose calibration ratios are nearest 1.\n"
    text = head + yaml.safe_dump(values, sort_keys=False)
    write_text(f"{config.output}/calibrated.yaml", text)


def calibration_figure(results: Mapping[str, Mapping[str, Numbers]], num_samples: int) -> Figure:
    """Draw ratios, rank histograms and coverage of every setting, a row for each space."""
    names = list(dict.fromkeys(space for measured in results.values() for space in measured))
    figure, panels = new_figure(9, 2.6 * len(names), len(names), ncols=3, squeeze=False)
    for row, space in zip(panels, names, strict=True):
        for i, (setting, measured) in enumerate(results.items()):
            if space in measured:
                draw_setting(row, measured[space], num_samples + 1, i, setting)
        ratios, ranks, covered = row
        ratios.axvline(1, color="grey", linewidth=0.8)
        ratios.set_yticks(range(len(results)), list(results), fontsize=6)
        ranks.axhline(1 / (num_samples + 1), color="grey", linewidth=0.8)
        covered.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        style_axes(ratios, f"calibration ratio, {space}", "")
        style_axes(ranks, "rank of the original", "share of images")
        style_axes(covered, "credible level", "coverage")
    return figure


def draw_setting(row: list[Axes], numbers: Numbers, num_ranks: int, i: int, name: str) -> None:
    """Draw ratio, ranks and coverage of setting i in one space."""
    ratios, ranks, covered = row
    color = f"C{i}"
    value, low, high = ratio(numbers)
    ratios.errorbar(value, i, xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=3)
    histogram = torch.bincount(numbers["ranks"], minlength=num_ranks) / len(numbers["ranks"])
    ranks.step(range(num_ranks), histogram, where="mid", color=color)
    level, share, *band = coverage(numbers["reference_ranks"], num_ranks, numbers["photograph"])
    covered.plot(level, share, color=color, label=name)
    covered.fill_between(level, *band, color=color, alpha=0.15)


def main(config: DictConfig) -> None:
    """Measure every setting, write table and figure, and save the best calibrated sampler."""
    number = at_least("num_samples", config.num_samples, 2)
    settings = {setting.name: setting for setting in find_settings(config)}
    results: dict[str, dict[str, Tensor]] = {}
    for name, setting in settings.items():
        wanted = dependencies(setting.apply(config), setting.checkpoint, "witness")
        results |= harness.measure({name: partial(measure, setting, config)}, wanted, config)
    measured = {name: by_space(values) for name, values in results.items()}
    rows = harness.interval_rows(results, {"cosine": "cosine"}, "setting")
    shared = set.intersection(*map(set, measured.values()))  # a decoder has no latents
    cells = [table_row(own, shared, number) for own in measured.values()]
    rows = [row | own for row, own in zip(rows, cells, strict=True)]
    save_figure(calibration_figure(measured, number), f"{config.output}/calibration.png")
    best = min(measured, key=lambda name: off(measured[name], shared))
    if isinstance(load_model(settings[best].checkpoint), FeatInv):
        write_sampler(settings[best], config)
    numbers = {
        name: {"cosine": values["cosine"], **measured[name]} for name, values in results.items()
    }
    about = (
        f"{len(results[best]['cosine'])} images, {number} samples each, seed {config.seed}; "
        f"witness {config.witness}; 95% bootstrap intervals over photographs. A ratio of 1 is "
        "calibrated, below 1 overconfident; p-values are of chi-square tests that the original's "
        f"ranks are flat. Nearest to 1: {best}."
    )
    harness.publish(rows, about, config, numbers)


if __name__ == "__main__":
    run_entry_point(main, "calibration")
