"""Shared by the tests of the callbacks: pictures without a data module, a quiet trainer."""

import lightning as L
import torch
from torch.utils.data import DataLoader

from featinv.training.checkpointing import SaveLast


def pictures(number: int, batch_size: int = 1) -> DataLoader:
    """Return the batches of `number` random pictures of 64 px."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, 3, 64, 64), generator=generator, dtype=torch.uint8)
    samples = [{"image": images[i], "index": i, "key": f"picture-{i}"} for i in range(number)]
    return DataLoader(samples, batch_size=batch_size)


def make_trainer(folder, *callbacks: L.Callback, **options) -> L.Trainer:
    """Return a trainer of four steps on the CPU that logs nothing."""
    defaults = {"max_steps": 4, "logger": False, "check_val_every_n_epoch": None}
    return L.Trainer(
        **defaults | options,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, SaveLast) for c in callbacks),
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


def weights(model) -> dict[str, torch.Tensor]:
    """Return a copy of a model's trained weights."""
    return {key: value.clone() for key, value in model.trained().state_dict().items()}
