"""Train a small classifier from scratch, to be a backbone: any timm architecture on any shards.

python experiments/train_backbone.py name=convnext_atto data.root=PATH

The recipe is timm's usual one: AdamW with a cosine schedule, RandAugment (Cubuk et al. 2020),
random erasing (Zhong et al. 2020), mixup or CutMix, and smoothed labels.
"""

import json
import random
import time
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import save
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

import harness
from featinv.backbones import Backbone
from featinv.cli.app import command, run_entry_point
from featinv.cli.train import choose_precision
from featinv.training.progress import ProgressBar
from featinv.utils.errors import at_least
from featinv.utils.files import atomic_write
from featinv.utils.pixels import from_uint8


def augmented_view(image: Image.Image, generator: torch.Generator, transform) -> Tensor:
    """Apply a transform of timm, whose draws then depend on the sample's number alone.

    Args:
        image: RGB picture.
        generator: Determines the draws.
        transform: From `timm.data.create_transform(..., use_prefetcher=True)`.

    Returns:
        uint8 tensor in [0, 255], shape (3, size, size).
    """
    seed = int(torch.randint(2**32, (), generator=generator))
    random.seed(seed)  # timm draws from Python's, numpy's and torch's global generators
    np.random.seed(seed)
    torch.manual_seed(seed)
    return transform(image)


class Classifier(L.LightningModule):
    """A timm classifier in training.

    Args:
        config: See `configs/train_backbone.yaml`.
        steps_per_epoch: Optimiser steps.
    """

    def __init__(self, config: DictConfig, steps_per_epoch: int) -> None:
        super().__init__()
        self.config, self.steps_per_epoch = config, steps_per_epoch
        # Frozen, but for its network: what preprocesses here preprocesses later.
        backbone = Backbone(
            config.name,
            weights="random",
            image_size=config.backbone.image_size,
            num_classes=config.num_classes,
        )
        self.preprocess = backbone.preprocess
        self.model = backbone.model.requires_grad_(True)
        self.mix = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.smoothing,
            num_classes=config.num_classes,
        )
        self.erase = RandomErasing(config.erase_prob, mode="pixel", device=self.device.type)
        self.loss = SoftTargetCrossEntropy()
        self.accuracy = MulticlassAccuracy(config.num_classes, average="micro")

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Return the loss of one batch, of mixed images and labels."""
        images = self.erase(self.preprocess(from_uint8(batch["image"])))
        images, labels = self.mix(images, batch["label"])
        loss = self.loss(self.model(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Count the images that are classified as they are labelled."""
        logits = self.model(self.preprocess(from_uint8(batch["image"])))
        self.accuracy(logits, batch["label"])
        self.log("val/accuracy", self.accuracy, prog_bar=True, batch_size=len(logits))

    test_step = validation_step

    def configure_optimizers(self) -> dict:
        """Return AdamW, without weight decay on biases and norms, and its cosine schedule."""
        optimizer = create_optimizer_v2(
            self.model, "adamw", lr=self.config.lr, weight_decay=self.config.weight_decay
        )
        schedule = CosineLRScheduler(
            optimizer,
            t_initial=self.trainer.max_steps,
            warmup_t=int(self.config.warmup_epochs * self.steps_per_epoch),
            warmup_prefix=False,
            t_in_epochs=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: CosineLRScheduler, metric: None) -> None:
        """Set the learning rate of the coming step."""
        scheduler.step_update(self.trainer.global_step)


def main(config: DictConfig) -> None:
    """Train, measure the accuracy on the validation shards, write weights and table."""
    at_least("epochs", config.epochs, 1)
    choose_precision(config)
    L.seed_everything(config.seed, verbose=False)
    data = instantiate(config.data)
    transform = create_transform(
        config.backbone.image_size,
        is_training=True,
        use_prefetcher=True,  # leaves pixels as they are, for the backbone's own preprocessing
        scale=(config.data.min_scale, 1.0),
        auto_augment=config.auto_augment,
        interpolation="bicubic",
    )
    data.train_view = partial(augmented_view, transform=transform)
    steps_per_epoch = -(-data.epoch_size() // data.batch_size)
    classifier = Classifier(config, steps_per_epoch)
    folder = Path(config.output)
    steps = config.trainer.max_steps
    steps = config.epochs * steps_per_epoch if steps == -1 else at_least("max_steps", steps, 1)
    trainer = instantiate(
        config.trainer,
        max_steps=steps,
        limit_train_batches=steps,
        val_check_interval=-(-steps // 5),  # optimiser steps
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=[ProgressBar()],
        logger=CSVLogger(folder, name="", version=""),
    )
    start = time.perf_counter()
    trainer.fit(classifier, data)
    minutes = (time.perf_counter() - start) / 60
    accuracy = trainer.test(classifier, data, verbose=False)[0]["val/accuracy"]
    numbers = {"accuracy": accuracy, "steps": steps, "minutes": minutes, "command": command()}
    with atomic_write(folder / "metrics.json") as file:
        file.write(f"{json.dumps(numbers)}\n".encode())
    millions = sum(p.numel() for p in classifier.model.parameters()) / 1e6
    row = {
        "architecture": config.name,
        "parameters": f"{millions:.1f} M",
        "epochs": f"{steps / steps_per_epoch:.3g}",
        "minutes": f"{minutes:.0f} on {classifier.device.type}",
        "accuracy": f"{accuracy:.3f}",
    }
    about = (
        "Accuracy on the validation shards. The weights, for backbone.weights=, are in "
        f"{folder / 'model.safetensors'}."
    )
    harness.publish([row], about, config)
    with atomic_write(folder / "model.safetensors") as file:  # last: it says that all is there
        weights = classifier.model.state_dict()
        file.write(save({name: value.cpu().contiguous() for name, value in weights.items()}))


if __name__ == "__main__":
    run_entry_point(main, "train_backbone")
