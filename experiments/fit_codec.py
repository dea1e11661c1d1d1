"""Fit the patch codec's basis, and measure what codecs keep and cost.

python experiments/fit_codec.py data.root=PATH

PATH holds Imagenette's shards. `output` gets the basis of 8x8 patches that the package ships,
patch_pca_8.safetensors, and a table: for each codec the cosine between features of originals and of
decoded images (128 px, 8 bits), the size of the latents, and how fast the small prior trains on
them. All images are of the train split: the first shards to fit to, the last one to compare on.
"""

import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

import harness
from featinv.backbones import Backbone
from featinv.cli.app import run_entry_point
from featinv.codecs import PatchPCA
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8, resize

IMAGE_SIZE = 128  # pixels, of the small models
BATCH_SIZE = 32


def load_shards(config: DictConfig, shards: str, num_images: int) -> Tensor:
    """Return the first images of some shards, uint8, at the backbone's size."""
    data = instantiate(config.data, val_shards=shards, max_images=num_images)
    batches = tqdm(data.test_dataloader(), desc=shards, unit="batch")
    return torch.cat([batch["image"] for batch in batches])


@torch.no_grad()
def ceiling(backbone: Backbone, images: Tensor, codec: PatchPCA | None) -> float:
    """Return the mean cosine of originals and decoded images; without codec, of resized ones."""
    cosines = []
    for batch in images.split(BATCH_SIZE):
        original = from_uint8(batch)
        small = resize(original, IMAGE_SIZE)
        if codec is not None:
            small = codec.decode(codec.encode(small)).clamp(-1, 1)
        features = [backbone.features(view) for view in (original, eight_bit(small))]
        cosines.append(spatial_cosine(*features))
    return torch.cat(cosines).mean().item()


def training_speed(latent_shape: tuple[int, int, int], steps: int) -> float:
    """Return the latents per CPU-second of training the small prior in float32."""
    channels, size, _ = latent_shape
    unet = compose("train", [f"model.codec.num_components={channels}"]).model.unet
    unet: UNet2DConditionModel = instantiate(unet, sample_size=size, _convert_="all")
    latents = torch.randn(BATCH_SIZE, *latent_shape)
    timesteps = torch.arange(BATCH_SIZE)

    def step() -> None:
        unet(latents, timesteps, None, return_dict=False)[0].square().mean().backward()

    step()  # warm up
    start = time.process_time()
    for _ in range(steps):
        step()
    return steps * BATCH_SIZE / (time.process_time() - start)


def main(config: DictConfig) -> None:
    """Fit bases, compare codecs, write the table."""
    backbone: Backbone = instantiate(config.backbone)
    train = load_shards(config, "imagenette-train-{0000..0006}.tar", config.num_images)
    small = torch.cat([resize(from_uint8(batch), IMAGE_SIZE) for batch in train.split(64)])
    held_out = load_shards(config, "imagenette-train-0007.tar", config.num_held_out)
    resized = ceiling(backbone, held_out, None)
    rows = [{"patch": "none: pixels", "components": "3", "cosine": f"{resized:.3f}"}]
    for patch_size, numbers in tqdm(config.tried.items(), desc="codecs", unit="patch size"):
        path = Path(config.output) / f"patch_pca_{patch_size}.safetensors"
        PatchPCA.save(PatchPCA.fit(small, patch_size, max(64, *numbers)), path)
        for num_components in numbers:
            codec = PatchPCA(num_components, basis=str(path))
            speed = training_speed(codec.latent_shape(IMAGE_SIZE), config.timed_steps)
            rows.append(
                {
                    "patch": f"{patch_size} px",
                    "components": str(num_components),
                    "cosine": f"{ceiling(backbone, held_out, codec):.3f}",
                    "numbers per image": f"{codec.encode(small[:1]).numel():,}",
                    "prior: latents per CPU-second": f"{speed:.0f}",
                }
            )
    about = (
        f"{len(train)} images to fit to, {len(held_out)} others to compare on, {IMAGE_SIZE} px; "
        f"features of {backbone.name}, layer {backbone.layer}; speed of forward and backward in "
        f"batches of {BATCH_SIZE}, float32, with {torch.get_num_threads()} thread(s)."
    )
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "fit_codec")
