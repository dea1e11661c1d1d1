"""Train a small classifier from scratch, to be a backbone: any timm architecture on any shards.

python experiments/train_backbone.py name=convnext_atto data.root=PATH

Beside the labels it learns from a teacher's answers to the same augmented and mixed images
(knowledge distillation, Hinton et al. 2015; a consistent teacher, Beyer et al. 2022). The target of
an image is (1 - d) times its label plus d times the teacher's probabilities of all classes: with d
up to 0.5 the label keeps the highest one, and the rest says what the image resembles. Student,
teacher and labels share ImageNet's numbering.

The same command again goes on where the training stopped.
"""

import json
import random
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import save
from timm.data import Mixup, create_transform
from timm.layers import set_fused_attn
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

import harness
from featinv.backbones import Backbone
from featinv.checkpoints import LAST_FILE, MODEL_FILE
from featinv.cli.app import command, run_entry_point
from featinv.cli.train import choose_precision
from featinv.evaluation.kept import check_same
from featinv.evaluation.tables import format_interval
from featinv.training.fit import fit
from featinv.training.loggers import FileLogger, logged_hours
from featinv.training.progress import ProgressBar
from featinv.utils.errors import InputError, at_least
from featinv.utils.files import atomic_write, write_text
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
        config: See `train_backbone` in `configs/experiments.yaml`.

    Attributes:
        hits: Which images the last validation classified as they are labelled; bool, shape (N,).

    Raises:
        InputError: The teacher knows another number of classes.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__()
        self.config = config
        # What preprocesses here preprocesses later; of it only the network trains.
        self.backbone = Backbone(
            config.name,
            weights="random",
            image_size=config.backbone.image_size,
            num_classes=config.num_classes,
        )
        self.model = self.backbone.model.requires_grad_(True).train()
        self.teacher = instantiate(config.teacher) if config.distillation else None
        if self.teacher and self.teacher.num_classes != config.num_classes:
            raise InputError(
                f"num_classes is {config.num_classes}, but the teacher {self.teacher.name} knows "
                f"{self.teacher.num_classes} classes: expected the same, or distillation=0."
            )
        self.mix = Mixup(
            config.mixup,
            config.cutmix,
            prob=float(config.mixup + config.cutmix > 0),
            label_smoothing=0,
            num_classes=config.num_classes,
        )
        self.loss = SoftTargetCrossEntropy()
        self.hits = torch.zeros(0, dtype=bool)
        self._hits: list[Tensor] = []  # of the batches so far

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Return the loss of one batch, of mixed images and labels."""
        images, targets = self.mix(from_uint8(batch["image"]), batch["label"])
        if self.teacher:
            with torch.no_grad():
                answers = self.teacher.classify(images).float().softmax(1)
            targets = targets.lerp(answers, self.config.distillation)
        loss = self.loss(self.model(self.backbone.normalize(images)).float(), targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Look which images are classified as they are labelled."""
        logits = self.model(self.backbone.preprocess(from_uint8(batch["image"])))
        self._hits.append(logits.argmax(1) == batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Count them."""
        self.hits = torch.cat(self._hits)
        self._hits.clear()
        self.log("val/accuracy", self.hits.float().mean(), prog_bar=True, sync_dist=True)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> dict:
        """Return AdamW, without weight decay on biases and norms; its rate rises, then falls."""
        config = self.config
        options = {"lr": config.lr, "weight_decay": config.weight_decay}
        optimizer = create_optimizer_v2(self.model, "adamw", **options)
        schedule = OneCycleLR(
            optimizer,
            config.lr,
            total_steps=self.trainer.max_steps,
            pct_start=config.warmup,
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_data(config: DictConfig) -> L.LightningDataModule:
    """Return the training images, augmented, with the held-out ones to choose by."""
    data = instantiate(config.data)
    transform = create_transform(
        config.train_size,
        is_training=True,
        use_prefetcher=True,  # leaves pixels as they are, for the backbone's own preprocessing
        scale=(config.data.min_scale, 1.0),
        color_jitter=config.color_jitter,
        interpolation="bicubic",
    )
    data.train_view = partial(augmented_view, transform=transform)
    return data


def last_checkpoint(config: DictConfig) -> Path | None:
    """Return what to go on from, if anything; a new run's folder gets its config.

    Raises:
        InputError: The run there was started with other values.
    """
    folder = Path(config.output)
    path, values = folder / "config.yaml", OmegaConf.to_container(config, resolve=True)
    last = folder / LAST_FILE
    if last.is_file():
        fixed = {key: value for key, value in values.items() if key not in ("trainer", "data")}
        check_same(path, OmegaConf.to_container(OmegaConf.load(path)), fixed)
        return last
    write_text(path, OmegaConf.to_yaml(config, resolve=True))
    return None


def make_trainer(config: DictConfig, steps: int) -> L.Trainer:
    """Return a trainer that saves and validates as it goes."""
    last = Path(config.output) / LAST_FILE
    saving = ModelCheckpoint(
        last.parent,
        last.stem,
        every_n_train_steps=config.save_every_n_steps,
        enable_version_counter=False,
    )
    return instantiate(
        config.trainer,
        max_steps=steps,
        limit_train_batches=steps,
        val_check_interval=min(config.validate_every_n_steps, steps),
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[ProgressBar(), saving],
        logger=FileLogger(config.output),
    )


def main(config: DictConfig) -> None:
    """Train, measure the accuracy on the test shards once, write weights and table."""
    at_least("epochs", config.epochs, 1)
    choose_precision(config)
    L.seed_everything(config.seed, verbose=False)
    # On a CPU the backward pass of fused attention takes 1.5 times as long in bfloat16.
    set_fused_attn(torch.cuda.is_available())
    data, classifier = make_data(config), Classifier(config)
    epoch, steps, folder = data.epoch_size(), config.trainer.max_steps, Path(config.output)
    if steps == -1:
        steps = config.epochs * epoch // data.batch_size
    trainer = make_trainer(config, at_least("max_steps", steps, 1))
    fit(trainer, classifier, data, last_checkpoint(config))
    trainer.test(classifier, instantiate(config.data, val_shards=config.test_shards), verbose=False)

    accuracy = harness.interval(classifier.hits.cpu())
    images = steps * data.batch_size * trainer.world_size
    numbers = {
        "accuracy": accuracy,
        "num_images": len(classifier.hits),
        "images_seen": images,
        "seconds": 3600 * logged_hours(folder),
        "device": classifier.device.type,
        "command": command(),
    }
    write_text(folder / "metrics.json", f"{json.dumps(numbers, indent=2)}\n")
    millions = sum(p.numel() for p in classifier.model.parameters()) / 1e6
    row = {
        "architecture": config.name,
        "parameters": f"{millions:.1f} M",
        "epochs": f"{images / epoch:.3g}",
        "minutes": f"{numbers['seconds'] / 60:.0f} on {numbers['device']}",
        "accuracy": format_interval(**accuracy),
    }
    about = (
        f"Accuracy on {numbers['num_images']} images of the test shards, with 95% bootstrap "
        f"interval. The weights, for backbone.weights=, are in {folder / MODEL_FILE}."
    )
    harness.publish([row], about, config)
    with atomic_write(folder / MODEL_FILE) as file:  # last: it says that all is there
        weights = classifier.model.state_dict()
        file.write(save({name: value.cpu().contiguous() for name, value in weights.items()}))


if __name__ == "__main__":
    run_entry_point(main, "train_backbone")
