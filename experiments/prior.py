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

from experiments.harness import publish
from featinv import FeatInv
from featinv.cli.app import command, make_batches, run_entry_point, sampler_options
from featinv.evaluation.figures import save_png
from featinv.evaluation.set_metrics import NEIGHBOUR, Extractor, compare_sets, distance_name
from featinv.utils.devices import pick_device
from featinv.utils.errors import at_least
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8

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
def extract_real(model: FeatInv, batches: list[dict], extractor: Extractor) -> dict[str, Tensor]:
    """Return what the extractor sees of real images, whole, small and through the codec."""
    seen: dict[str, list[Tensor]] = {"real": [], "ceiling": [], "codec": []}
    for batch in tqdm(batches, unit="batch", desc="real images"):
        images = from_uint8(batch["image"].to(model.device))
        small = resize(images, model.image_size)
        decoded = model.codec.decode(model.codec.encode(small))
        for row, view in {"real": images, "ceiling": small, "codec": decoded}.items():
            seen[row].append(extractor(eight_bit(view)))
    return {row: torch.cat(parts) for row, parts in seen.items()}


@torch.no_grad()
def main(config: DictConfig) -> None:
    """Draw, compare, write the table and the picture."""
    extractors = [Extractor(name) for name in config.extractors]
    at_least("num_images", config.num_images, NEIGHBOUR + 1)
    model = FeatInv.load(config.checkpoint).to(pick_device(config.device))
    model.sampler = model.settings(**sampler_options(config))
    batches = make_batches(config, model)
    seen = {extractor.name: extract_real(model, batches, extractor) for extractor in extractors}
    start = time.perf_counter()
    samples = draw(model, len(seen[extractors[0].name]["real"]), config)
    seconds = (time.perf_counter() - start) / len(samples)
    folder = Path(config.output)
    save_png(make_grid(samples[: config.num_pictures], nrow=10), folder / "samples.png")
    distances: dict[str, dict] = {}
    for extractor in extractors:
        drawn = (from_uint8(batch.to(model.device)) for batch in samples.split(config.batch_size))
        sets = seen[extractor.name] | {"samples": torch.cat([extractor(batch) for batch in drawn])}
        real = sets.pop("real")
        distances[extractor.name] = {row: compare_sets(real, fake) for row, fake in sets.items()}
    titles = {
        "ceiling": "ceiling: the real images at the model's resolution",
        "codec": "codec: the real images through the codec",
        "samples": "samples of the prior",
    }
    rows = [
        {"compared with real images": title}
        | {
            distance_name(name, extractor): f"{value:.3g}"
            for extractor, sets in distances.items()
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
