"""Train a small classifier from scratch, to be a backbone: any timm architecture on any shards.

python experiments/train_backbone.py name=convnext_atto data.root=PATH

Besides the labels it learns a teacher's predictions for the same augmented and mixed images
(knowledge distillation, Hinton et al. 2015; a consistent teacher, Beyer et al. 2022). The target of
an image is (1 - d) times its label plus d times the teacher's class probabilities: with d up to 0.5
the label stays the most likely class, and the rest tells what the image resembles. Student, teacher
and labels share ImageNet's class numbers.

The same command continues an interrupted training.
"""

import random
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from timm.data import Mixup, create_transform
from timm.layers import set_fused_attn
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

import harness
from featinv.backbones import Backbone
from featinv.checkpoints import LAST_FILE, MODEL_FILE
from featinv.cli.app import run_entry_point
from featinv.cli.train import choose_precision, make_trainer, prepare_folder, set_steps
from featinv.evaluation.cache import check_settings
from featinv.evaluation.tables import format_interval
from featinv.training.fit import fit
from featinv.training.loggers import logged_hours
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import from_uint8
from featinv.utils.tensor_files import save_tensors

# Keys that may differ where a training continues; the others determine its weights.
CHANGEABLE = ("output", "resume", "trainer", "data", "callbacks", "logger", "wandb")


def augmented_view(image: Image.Image, generator: torch.Generator, transform) -> Tensor:
    """Apply a transform of timm, with random choices that depend on the generator alone.

    Returns uint8 in [0, 255], shape (3, size, size).
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
        hits: Which images the last validation classified correctly; bool, shape (N,).

    Raises:
        InputError: The teacher has another number of classes.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__()
        self.config = config
        # The backbone that will be inverted, with its preprocessing; only its network is trained.
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
                f"num_classes is {config.num_classes}, but the teacher {self.teacher.name} has "
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
        """Return the loss of a batch, after mixing its images and labels."""
        images, targets = self.mix(from_uint8(batch["image"]), batch["label"])
        if self.teacher:
            with torch.no_grad():
                teacher_probabilities = self.teacher.classify(images).float().softmax(1)
            targets = targets.lerp(teacher_probabilities, self.config.distillation)
        loss = self.loss(self.model(self.backbone.normalize(images)).float(), targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Record which images are classified correctly."""
        logits = self.model(self.backbone.preprocess(from_uint8(batch["image"])))
        self._hits.append(logits.argmax(1) == batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy."""
        self.hits = torch.cat(self._hits)
        self._hits.clear()
        self.log("val/accuracy", self.hits.float().mean(), prog_bar=True, sync_dist=True)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> dict:
        """Return AdamW, without weight decay on biases and norms, and a one-cycle schedule."""
        lr, decay = self.config.lr, self.config.weight_decay
        optimizer = create_optimizer_v2(self.model, "adamw", lr=lr, weight_decay=decay)
        cycle = {"pct_start": self.config.warmup, "cycle_momentum": False}
        schedule = OneCycleLR(optimizer, lr, total_steps=self.trainer.max_steps, **cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_data(config: DictConfig) -> L.LightningDataModule:
    """Return augmented training images and the held-out ones for validation."""
    data = instantiate(config.data)
    transform = create_transform(
        config.train_size,
        is_training=True,
        use_prefetcher=True,  # leaves the pixels to the backbone's own preprocessing
        scale=(config.data.min_scale, 1.0),
        color_jitter=config.color_jitter,
        interpolation="bicubic",
    )
    data.train_view = partial(augmented_view, transform=transform)
    return data


def find_checkpoint(config: DictConfig) -> Path | None:
    """Return the checkpoint to continue from, if any.

    Raises:
        InputError: It is of other values than the config's.
    """
    folder = Path(config.output)
    if not config.resume or not (folder / LAST_FILE).is_file():
        return None
    path, values = folder / "config.yaml", OmegaConf.to_container(config, resolve=True)
    fixed = {key: value for key, value in values.items() if key not in CHANGEABLE}
    check_settings(path, OmegaConf.to_container(OmegaConf.load(path)), fixed)
    return folder / LAST_FILE


def main(config: DictConfig) -> None:
    """Train, measure the accuracy on the test shards, write weights and table."""
    choose_precision(config)
    L.seed_everything(config.seed, verbose=False)
    # On a CPU the backward pass of fused attention takes 1.5 times as long in bfloat16.
    set_fused_attn(torch.cuda.is_available())
    data, classifier, folder = make_data(config), Classifier(config), Path(config.output)
    checkpoint = find_checkpoint(config)
    config.resume = None if checkpoint is None else config.resume
    if config.trainer.max_steps == -1:
        set_steps(config, data)
    at_least("trainer.max_steps", config.trainer.max_steps, 1)
    trainer = make_trainer(config)
    if trainer.is_global_zero:
        prepare_folder(config)
    fit(trainer, classifier, data, checkpoint)
    images_seen = data.samples_seen()
    trainer.test(classifier, instantiate(config.data, val_shards=config.test_shards), verbose=False)

    accuracy = harness.interval(classifier.hits.cpu())
    metrics = {
        "accuracy": accuracy,
        "num_images": len(classifier.hits),
        "images_seen": images_seen,
        "seconds": 3600 * logged_hours(folder),
        "device": classifier.device.type,
    }
    millions = sum(p.numel() for p in classifier.model.parameters()) / 1e6
    row = {
        "architecture": config.name,
        "parameters": f"{millions:.1f} M",
        "epochs": f"{images_seen / data.epoch_size():.3g}",
        "minutes": f"{metrics['seconds'] / 60:.0f} on {metrics['device']}",
        "accuracy": format_interval(**accuracy),
    }
    about = (
        f"Accuracy on {metrics['num_images']} images of the test shards, with 95% bootstrap "
        f"interval. The weights, for backbone.weights=, are in {folder / MODEL_FILE}."
    )
    harness.publish([row], about, config, metrics=metrics)
    # Last: it marks the run as finished.
    save_tensors(folder / MODEL_FILE, classifier.model.state_dict())


if __name__ == "__main__":
    run_entry_point(main, "train_backbone")
