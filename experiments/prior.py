"""How good priors are: the distance of their samples, as a set, to real images, and some of them.

python experiments/prior.py checkpoints=[outputs/small/prior] data=imagenette data.root=PATH

Beside the samples stand the best possible distances: of the same real images at the first model's
resolution, and through its codec.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchvision.utils import make_grid
from tqdm.auto import tqdm

import harness
from drawing import draw_samples, in_chunks, load_images
from featinv import FeatInv
from featinv.cli.app import run_entry_point
from featinv.evaluation.cache import load_or_make
from featinv.evaluation.figures import save_png
from featinv.evaluation.set_metrics import NEIGHBOUR, Extractor, compare_sets, distance_name
from featinv.evaluation.tables import bullets
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import eight_bit, from_uint8, resize
from settings import dependencies, describe_sampling, find_models, open_model

LIMITS = {
    "ceiling": "ceiling: the real images at the model's resolution",
    "codec": "codec: the real images through the codec",
}


def draw_unconditionally(model: FeatInv, images: dict, config: DictConfig) -> dict[str, Tensor]:
    """Return as many `samples` as images, uint8, (N, 3, H, W), and the `seconds` of each."""
    nothing = torch.zeros(1, *model.backbone.feature_shape)

    def draw(rows: Tensor) -> dict[str, Tensor]:
        condition = nothing.expand(len(rows), -1, -1, -1)
        draws = draw_samples(model, condition, rows, config, num_samples=1)
        seconds = torch.full((len(rows),), draws.seconds / len(rows))
        return {"samples": draws.first(), "seconds": seconds}

    return in_chunks(images, config, draw)


@torch.no_grad()
def distances(
    model: FeatInv, images: Tensor, samples: Tensor, extractor: Extractor
) -> dict[str, dict[str, float]]:
    """Return row of the table -> distances to the real images in an extractor's features."""
    seen: dict[str, list[Tensor]] = {row: [] for row in ("real", *LIMITS, "samples")}
    batches = list(zip(images.split(32), samples.split(32), strict=True))
    for real, drawn in tqdm(batches, unit="batch", desc=extractor.name):
        whole = from_uint8(real.to(model.device))
        small = resize(whole, model.image_size)
        decoded = eight_bit(model.codec.decode(model.codec.encode(small)))
        views = (whole, eight_bit(small), decoded, from_uint8(drawn.to(model.device)))
        for row, view in zip(seen, views, strict=True):
            seen[row].append(extractor(view))
    sets = {row: torch.cat(parts) for row, parts in seen.items()}
    real = sets.pop("real")
    return {row: compare_sets(real, fake) for row, fake in sets.items()}


def measure(
    model: FeatInv, name: str, checkpoint: str, extractors: list[Extractor], config: DictConfig
) -> dict:
    """Draw as many samples as there are images, show some, and compare; return the numbers."""
    folder = Path(config.output)
    images = load_images(config, model)
    drawn = load_or_make(
        folder / f"{harness.file_name(name)}.safetensors",
        dependencies(config, checkpoint),
        lambda: draw_unconditionally(model, images, config),
    )
    samples = drawn["samples"]
    picture = make_grid(samples[: config.num_pictures], nrow=10)
    save_png(picture, folder / f"{harness.file_name(name)}.png")
    sets = {e.name: distances(model, images["image"], samples, e) for e in extractors}
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
    at_least("num_images", config.num_images, NEIGHBOUR + 1)
    if (scale := config.sampler.guidance_scale) is not None:
        raise InputError(
            f"sampler.guidance_scale is {scale}, but a prior draws without a condition: expected "
            "no value."
        )
    # Then a model with a condition draws without it.
    config = OmegaConf.merge(config, {"sampler": {"guidance_scale": 0}})
    metrics, rows, how = {}, [], []
    for name, checkpoint in find_models(config.checkpoints).items():
        model = open_model(checkpoint, config)
        found = metrics[name] = measure(model, name, checkpoint, extractors, config)
        if not rows:
            rows += [{"set": title} | cells(found["sets"], row) for row, title in LIMITS.items()]
        parameters = sum(p.numel() for p in model.unet.parameters())
        about = {"s per sample": f"{found['seconds_per_sample']:.3f}"}
        about["parameters"] = f"{parameters / 1e6:.1f} M"
        rows.append({"set": f"samples of {name}"} | cells(found["sets"], "samples") | about)
        how.append(f"{name}: {describe_sampling(model, config)}.")
    about = (
        f"{found['num_images']} real images and as many samples of each prior, seed {config.seed}, "
        f"on {model.device.type}.\n\n{bullets(how)}"
    )
    harness.publish(rows, about, config, metrics={"seed": config.seed, "priors": metrics})


if __name__ == "__main__":
    run_entry_point(main, "prior")
