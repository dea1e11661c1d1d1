"""SampleGrid: reconstructions at every validation, and a check that features are used."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from torchvision.utils import make_grid

from featinv.evaluation.figures import save_png
from featinv.metrics import spatial_cosine
from featinv.models.base import Inverter
from featinv.utils.distributed import gather, share_rows
from featinv.utils.errors import at_least
from featinv.utils.pixels import from_uint8, resize, to_uint8


class SampleGrid(L.Callback):
    """Invert a few fixed held-out images at every validation: save a grid, log two numbers.

    `val/feature_cosine` is the spatial feature cosine between originals and reconstructions,
    `val/feature_cosine_shuffled` the same for reconstructions from another image's features: the
    two are equal if the model ignores its condition. With several layers, the grid has a row for
    each, and names end in the layer, except for the backbone's default.

    Args:
        folder: Where the grids are written.
        num_images: How many images, from the start of the validation set; 2 or more.
        num_steps: Denoising steps.

    Raises:
        InputError: A value out of its range.
    """

    def __init__(self, folder: str, num_images: int = 8, num_steps: int = 10) -> None:
        self.folder = Path(folder)
        self.num_images = at_least("sample_grid.num_images", num_images, 2)
        self.num_steps = at_least("sample_grid.num_steps", num_steps, 1)
        self._images: dict[int, torch.Tensor] = {}  # by their position in the validation set

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Inverter, outputs, batch: dict, *args
    ) -> None:
        """Collect this rank's first images of the validation set."""
        missing = self.num_images - len(self._images)
        indices = batch["index"][:missing].tolist()
        self._images |= dict(zip(indices, batch["image"], strict=False))

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """Draw, measure, save and log."""
        images = self._first_images(pl_module.device)
        if trainer.sanity_checking:
            return
        rows = [
            self._draw_layer(pl_module, from_uint8(images), layer)
            for layer in pl_module.backbone.layers
        ]
        if trainer.is_global_zero:
            originals = to_uint8(resize(from_uint8(images), pl_module.image_size))
            grid = make_grid(torch.cat([originals, *rows]).cpu(), len(images), pad_value=255)
            save_png(grid, self.folder / f"step_{trainer.global_step:07d}.png")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("val/reconstructions", [grid.permute(1, 2, 0).numpy()])

    def _draw_layer(self, model: Inverter, images: torch.Tensor, layer: str) -> torch.Tensor:
        """Return reconstructions from a layer's features, uint8; log their cosines."""
        features = model.backbone.features(images, layer)
        options = {"num_steps": self.num_steps} if hasattr(model, "sampler") else {}

        def draw(rows: Sequence[int]) -> torch.Tensor:
            drawn = model.invert(features[rows], layer=layer, indices=rows, **options)
            return to_uint8(drawn[:, 0])

        drawn = share_rows(draw, len(images))
        if model.conditioning != "none":
            seen = model.backbone.features(from_uint8(drawn), layer)
            end = "" if layer == model.backbone.layer else f"/{layer}"
            # Rolled by one: each original against the reconstruction of the image before.
            values = {
                f"val/feature_cosine{end}": spatial_cosine(features, seen).mean(),
                f"val/feature_cosine_shuffled{end}": spatial_cosine(
                    features, seen.roll(1, 0)
                ).mean(),
            }
            model.log_dict(values, sync_dist=True, batch_size=1)  # equal on all ranks
        return drawn

    def _first_images(self, device: torch.device) -> torch.Tensor:
        """Return the first images of the validation set, gathered from all ranks."""
        # `gather` needs tensors with equally many dimensions, even from a rank without images.
        images = torch.stack(list(self._images.values()) or [torch.empty(0, 0, 0)]).byte()
        indices = torch.tensor(list(self._images), dtype=torch.int64)
        self._images = {}
        images = [part for part in gather(images.to(device)) if part.numel()]
        order = torch.cat(gather(indices.to(device))).argsort()
        return torch.cat(images)[order[: self.num_images]]
