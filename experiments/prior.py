"""Score priors by the distance between their samples and real images, and show some samples.

python experiments/prior.py checkpoints=[outputs/small/prior] data=imagenette data.root=PATH

Beside the samples stand the best possible distances: of the same real images at the first model's
resolution, and through its codec.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchvision.utils import make_grid
from tqdm.auto import tqdm

import harness
from drawing import draw_samples, in_chunks, load_images
from featinv import FeatInv
from featinv.cli.app import open_model, run_entry_point, sampler_options
from featinv.evaluation.cache import load_or_make
from featinv.evaluation.figures import save_png
from featinv.evaluation.set_metrics import NEIGHBOUR, Extractor, compare_sets, distance_name
from featinv.evaluation.tables import bullets
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import eight_bit, from_uint8, resize
from settings import dependencies, find_models

View = Callable[[Tensor], Tensor]  # of images (B, 3, H, W) in [-1, 1]

LIMITS = {
    "ceiling": "ceiling: the real images at the model's resolution",
    "codec": "codec: the real images through the codec",
}


def draw_unconditionally(model: FeatInv, images: dict, config: DictConfig) -> dict[str, Tensor]:
    """Return as many `samples` as images, uint8, (N, 3, H, W), and the `seconds` of each."""
    nothing = torch.zeros(1, *model.backbone.feature_shape)

    def draw(rows: Tensor) -> dict[str, Tensor]:
        condition = nothing.expand(len(rows), -1, -1, -1)
        draws = draw_samples(model, condition, images["index"][rows], config, num_samples=1)
        seconds = torch.full((len(rows),), draws.seconds / len(rows))
        return {"samples": draws.first(), "seconds": seconds}

    return in_chunks(images, config, draw)


@torch.no_grad()
def see(
    extractor: Extractor, device: torch.device, images: Tensor, view: View = lambda images: images
) -> Tensor:
    """Return the features of a view of images (N, 3, H, W), uint8."""
    batches = tqdm(images.split(32), unit="batch", desc=extractor.name, leave=False)
    return torch.cat([extractor(view(from_uint8(part.to(device)))) for part in batches])


def views(model: FeatInv) -> dict[str, View]:
    """Return row of `LIMITS` -> what a model could at best make of images."""

    def small(images: Tensor) -> Tensor:
        return resize(images, model.image_size)

    return {
        "ceiling": lambda images: eight_bit(small(images)),
        "codec": lambda images: eight_bit(model.codec.decode(model.codec.encode(small(images)))),
    }


def measure(
    model: FeatInv,
    name: str,
    checkpoint: str,
    extractors: list[Extractor],
    limits: dict[str, View],
    config: DictConfig,
) -> dict:
    """Draw as many samples as there are images, show some, and compare; return the numbers.

    `sets` is extractor -> row, `samples` or one of `limits` -> distances to the images.
    """
    folder = Path(config.output)
    images = load_images(config, model)
    drawn = load_or_make(
        folder / f"{harness.file_name(name)}.safetensors",
        dependencies(config, checkpoint),
        lambda: draw_unconditionally(model, images, config),
    )
    samples, sets = drawn["samples"], {}
    picture = make_grid(samples[: config.num_pictures], nrow=10)
    save_png(picture, folder / f"{harness.file_name(name)}.png")
    for extractor in extractors:
        real = see(extractor, model.device, images["image"])
        seen = {row: see(extractor, model.device, images["image"], limits[row]) for row in limits}
        seen["samples"] = see(extractor, model.device, samples)
        sets[extractor.name] = {row: compare_sets(real, fake) for row, fake in seen.items()}
    seconds = float(drawn["seconds"].mean())
    return {"sets": sets, "num_images": len(samples), "seconds_per_sample": seconds}


def cells(sets: dict[str, dict], row: str) -> dict[str, str]:
    """Return the distances of a row as text."""
    return {
        distance_name(kind, extractor): f"{value:.3g}"
        for extractor, found in sets.items()
        for kind, value in found[row].items()
    }


def main(config: DictConfig) -> None:
    """Measure every prior, write table and pictures."""
    extractors = [Extractor(name) for name in config.extractors]
    if config.num_images is not None:
        at_least("num_images", config.num_images, NEIGHBOUR + 1)
    if (scale := config.sampler.guidance_scale) is not None:
        raise InputError(
            f"sampler.guidance_scale is {scale}, but a prior draws without a condition: expected "
            "no value."
        )
    # Then a model with a condition draws without it.
    config = OmegaConf.merge(config, {"sampler": {"guidance_scale": 0}})
    metrics, rows, captions = {}, [], []
    for name, checkpoint in find_models(config.checkpoints).items():
        model = open_model(checkpoint, config)
        limits = {} if rows else views(model)  # those of the first model
        found = metrics[name] = measure(model, name, checkpoint, extractors, limits, config)
        if not rows:
            rows += [{"set": title} | cells(found["sets"], row) for row, title in LIMITS.items()]
        parameters = sum(p.numel() for p in model.unet.parameters())
        row = {"set": f"samples of {name}"} | cells(found["sets"], "samples")
        row["s per sample"] = f"{found['seconds_per_sample']:.3f}"
        rows.append(row | {"parameters": f"{parameters / 1e6:.1f} M"})
        captions.append(f"{name}: {model.settings(**sampler_options(config)).describe()}.")
    about = (
        f"{found['num_images']} real images and as many samples of each prior, seed {config.seed}, "
        f"on {model.device.type}.\n\n{bullets(captions)}"
    )
    harness.publish(rows, about, config, metrics={"seed": config.seed, "priors": metrics})


if __name__ == "__main__":
    run_entry_point(main, "prior")
