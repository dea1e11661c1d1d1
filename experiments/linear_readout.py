"""How much of held-out photographs a linear map from features to latents explains, by layer.

python experiments/linear_readout.py

Ridge regression from a backbone's features at each position to the codec's latents there, fitted to
random crops of the thirteen bundled training photographs and scored on 24 crops of the three
held-out ones. It shows what the quickstart can hope to learn.
"""

from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import harness
from featinv.backbones import Backbone
from featinv.cli.app import run_entry_point
from featinv.codecs import PatchPCA
from featinv.data import PhotosDataModule
from featinv.utils.pixels import from_uint8, resize

CHANNELS = ("brightness", "first colour", "gradient")  # the codec's first ones
BATCH_SIZE = 32


@torch.no_grad()
def pairs(backbone: Backbone, codec: PatchPCA, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return features (N, C) and latents (N, c) at all positions."""
    features, latents = [], []
    for batch in batches:
        images = from_uint8(batch)
        z_0 = codec.encode(resize(images, 128))
        maps = F.interpolate(backbone.features(images), z_0.shape[-2:], mode="bilinear")
        features.append(maps.permute(0, 2, 3, 1).flatten(0, 2))
        latents.append(z_0.permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat(features), torch.cat(latents)


def held_out_r2(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], penalty: float
) -> np.ndarray:
    """Return the explained share of the variance of each latent channel, shape (c,)."""
    ridge = make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(*train)
    return r2_score(test[1], ridge.predict(test[0]), multioutput="raw_values")


def main(config: DictConfig) -> None:
    """Fit and score every layer with every penalty, write the table."""
    size = config.backbone.image_size
    data = PhotosDataModule(image_size=size, batch_size=BATCH_SIZE, seed=config.seed)
    batches = islice(data.train_dataloader(), -(-config.num_crops // BATCH_SIZE))
    train = [batch["image"] for batch in batches]
    test = [batch["image"] for batch in data.test_dataloader()]
    codec, rows = PatchPCA(24), []
    for layer in config.layers:
        backbone = instantiate(config.backbone, layer=layer)
        fitted, held_out = pairs(backbone, codec, train), pairs(backbone, codec, test)
        for penalty in config.penalties:
            r2 = held_out_r2(fitted, held_out, penalty)
            cells = {f"R2 {name}": f"{r2[i]:.2f}" for i, name in enumerate(CHANNELS)}
            rows.append({"layer": layer, "penalty": f"{penalty:.0e}"} | cells)
    about = (
        f"{sum(map(len, train))} crops to fit to, {sum(map(len, test))} of other photographs to "
        f"score, seed {config.seed}; features of {backbone.name}."
    )
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "linear_readout")
