"""How good a prior is: how far its samples are, as a set, from real images, and a picture of some.

python experiments/prior.py checkpoint=outputs/small/prior data=imagenette data.root=PATH

Beside the samples stand the distances of what they could be at best: the same real images at the
model's resolution, and through its codec.
"""

import json
import logging
import time
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from featinv import FeatInv
from featinv.cli import command, make_batches, pick_device, run_entry_point, sampler_options
from featinv.data.base import at_least
from featinv.distributions import NEIGHBOUR, Judge, compare_sets, distance_name
from featinv.pixels import eight_bit, from_uint8, resize, to_uint8
from featinv.report import save_png
from featinv.scoring import publish

log = logging.getLogger("prior")


@torch.no_grad()
def draw(model: FeatInv, number: int, config: DictConfig) -> Tensor:
    """Return unconditional samples, uint8, (number, 3, image_size, image_size)."""
    nothing = torch.zeros(1, *model.backbone.feature_shape)
    batches = tqdm(torch.arange(number).split(config.batch_size), unit="batch", desc="draw samples")
    return torch.cat(
        [
            to_uint8(
                model.invert(
                    nothing.expand(len(batch), -1, -1, -1),
                    guidance_scale=0,  # of a model with a condition: as if it had none
                    seed=config.seed,
                    indices=batch.tolist(),
                    batch_size=config.batch_size,
                    precision=config.precision,
                )[:, 0]
            ).cpu()
            for batch in batches
        ]
    )


@torch.no_grad()
def judge_real(model: FeatInv, batches: list[dict], judge: Judge) -> dict[str, Tensor]:
    """Return what the judge sees of real images, whole, small and through the codec."""
    seen: dict[str, list[Tensor]] = {"real": [], "ceiling": [], "codec": []}
    for batch in tqdm(batches, unit="batch", desc="judge real images"):
        images = from_uint8(batch["image"].to(model.device))
        small = resize(images, model.image_size)
        decoded = model.codec.decode(model.codec.encode(small))
        for row, view in {"real": images, "ceiling": small, "codec": decoded}.items():
            seen[row].append(judge(eight_bit(view)))
    return {row: torch.cat(parts) for row, parts in seen.items()}


@torch.no_grad()
def main(config: DictConfig) -> None:
    """Draw, judge, write the table and the picture."""
    judges = [Judge(name) for name in config.judges]
    at_least("num_images", config.num_images, NEIGHBOUR + 1)
    model = FeatInv.load(config.checkpoint).to(pick_device(config.device))
    model.sampler = model.settings(**sampler_options(config))
    batches = make_batches(config, model)
    seen = {judge.name: judge_real(model, batches, judge) for judge in judges}
    start = time.perf_counter()
    samples = draw(model, len(seen[judges[0].name]["real"]), config)
    seconds = (time.perf_counter() - start) / len(samples)
    folder = Path(config.output)
    save_png(make_grid(samples[: config.num_pictures], nrow=10), folder / "samples.png")
    distances: dict[str, dict] = {}
    for judge in judges:
        drawn = (from_uint8(batch.to(model.device)) for batch in samples.split(config.batch_size))
        sets = seen[judge.name] | {"samples": torch.cat([judge(batch) for batch in drawn])}
        real = sets.pop("real")
        distances[judge.name] = {row: compare_sets(real, fake) for row, fake in sets.items()}
    titles = {
        "ceiling": "ceiling: the real images at the model's resolution",
        "codec": "codec: the real images through the codec",
        "samples": "samples of the prior",
    }
    rows = [
        {"compared with real images": title}
        | {
            distance_name(name, judge): f"{value:.3g}"
            for judge, sets in distances.items()
            for name, value in sets[row].items()
        }
        for row, title in titles.items()
    ]
    about = (
        f"{len(samples)} real images and as many samples, seed {config.seed}; "
        f"{model.sampler.scheduler}, {model.sampler.num_steps} steps; {seconds:.3f} s per sample "
        f"on {model.device.type}."
    )
    numbers = {"sets": distances, "num_images": len(samples), "seed": config.seed}
    (folder / "metrics.json").write_text(json.dumps({**numbers, "command": command()}) + "\n")
    publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "prior")
