import json

import pytest
import torch
from data.conftest import make_shards
from PIL import Image
from timm.data import create_transform

import train_backbone
from featinv.backbones import Backbone
from featinv.data import ShardsDataModule
from featinv.utils.pixels import from_uint8

TINY = [
    "epochs=1",
    "backbone.image_size=32",
    "data.num_train_images=12",
    "data.batch_size=4",
    "data.num_workers=0",
    "data.train_shards=train-*.tar",
    "data.val_shards=val-*.tar",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "train_size=32",
    "test_shards=val-*.tar",
    "teacher.name=resnet10t",
    "teacher.weights=random",
    "teacher.image_size=32",
    "+teacher.num_classes=10",
]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    make_shards(folder, "train", [6, 6])
    make_shards(folder, "val", [5])
    return folder


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_trained_classifier_is_a_backbone(name, shards, experiment, tmp_path):
    output = tmp_path / "out"
    own = [f"name={name}", "num_classes=10", f"data.root={shards}", "lr=1e-2"]
    (row,) = experiment("train_backbone", *TINY, *own, output=output)
    weights = str(output / "model.safetensors")
    trained = Backbone(name, weights=weights, image_size=32, num_classes=10)
    fresh = Backbone(name, weights="random", image_size=32, num_classes=10)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert not torch.allclose(trained.classify(images), fresh.classify(images), atol=1e-3)
    held_out = ShardsDataModule(
        root=str(shards), val_shards="val-*.tar", image_size=32, batch_size=5
    )
    (batch,) = held_out.test_dataloader()
    classes = trained.classify(from_uint8(batch["image"])).argmax(1)
    accuracy = float((classes == batch["label"]).float().mean())
    numbers = json.loads((output / "metrics.json").read_text())
    assert numbers["accuracy"]["mean"] == pytest.approx(accuracy)
    assert numbers["accuracy_among_present"]["mean"] >= accuracy and numbers["images_seen"] == 12
    assert row["accuracy"].startswith(f"{accuracy:.3f} [") and row["epochs"] == "1"
    assert "train/loss" in (output / "metrics.jsonl").read_text()


def test_what_is_drawn_depends_on_the_sample_only(shards):
    def batch(first: int) -> torch.Tensor:
        options = {"auto_augment": "rand-m9-mstd0.5-inc1", "use_prefetcher": True}
        transform = create_transform(32, is_training=True, **options)
        image = Image.new("RGB", (40, 40), (200, 30, 90))
        image.paste((0, 255, 0), (5, 5, 20, 30))
        torch.manual_seed(first)  # what was drawn before
        generator = torch.Generator().manual_seed(11)
        return train_backbone.augmented_view(image, generator, transform)

    assert torch.equal(batch(0), batch(1))
    assert batch(0).dtype == torch.uint8 and batch(0).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("name=resnet11", "Unknown backbone 'resnet11': did you mean"),
        ("num_classes=9", "num_classes is 9, but the teacher resnet10t knows 10 classes"),
        ("epochs=0", "epochs is 0: expected an integer of at least 1"),
    ],
)
def test_bad_input(override, sentence, shards, refusal):
    assert sentence in refusal("train_backbone", *TINY, f"data.root={shards}", override)
