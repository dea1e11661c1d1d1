import json
from contextlib import suppress

import pytest
import torch
from cli.test_configs import composed
from data.conftest import make_shards
from helpers import steps_done
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform

import train_backbone
from featinv import InputError
from featinv.backbones import Backbone
from featinv.data import ShardsDataModule
from featinv.utils.pixels import from_uint8

TINY = [
    "num_classes=10",
    "train_size=32",
    "backbone.image_size=32",
    "backbone@teacher=resnet10t_random",
    "teacher.image_size=32",
    "+teacher.num_classes=10",
    "data.num_train_images=12",
    "data.batch_size=2",
    "trainer.accumulate_grad_batches=2",
    "data.train_shards=train-*.tar",
    "data.val_shards=held-*.tar",
    "test_shards=val-*.tar",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "callbacks.save_last.every_n_steps=2",
    "lr=1e-2",
]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, counts in (("train", [6, 6]), ("held", [3]), ("val", [5])):
        make_shards(folder, name, counts)
    return folder


def test_a_trained_classifier_is_a_backbone(shards, experiment, refusal, tmp_path):
    own, folder = [*TINY, f"data.root={shards}", "epochs=1"], tmp_path / "out"
    (row,) = experiment("train_backbone", *own, output=folder)  # 3 steps
    options = {"image_size": 32, "num_classes": 10}
    trained = Backbone("resnet10t", weights=str(folder / "model.safetensors"), **options)
    fresh = Backbone("resnet10t", weights="random", **options).model.state_dict()
    finished = trained.model.state_dict()
    for key in ("fc.weight", "bn1.running_mean"):  # batch norms saw batches
        assert not torch.allclose(fresh[key], finished[key], atol=1e-3)
    data = ShardsDataModule(root=shards, val_shards="val-*.tar", image_size=32, batch_size=5)
    (batch,) = data.test_dataloader()
    classes = trained.classify(from_uint8(batch["image"])).argmax(1)
    accuracy = float((classes == batch["label"]).float().mean())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["accuracy"]["mean"] == pytest.approx(accuracy)
    assert metrics["num_images"] == 5 and metrics["images_seen"] == 12
    assert row["accuracy"].startswith(f"{accuracy:.3f} [") and row["epochs"] == "1"

    # Interrupted after the checkpoint of step 2, the same command ends with the same weights.
    interrupted = tmp_path / "interrupted"
    boom = f"+callbacks.boom={{_target_: helpers.Boom, batch: 4, marker: {tmp_path / 'marker'}}}"
    for _ in range(2):
        with suppress(RuntimeError):
            experiment("train_backbone", *own, boom, output=interrupted, kept=True)
    again = load_file(interrupted / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in finished.items())
    counted = json.loads((interrupted / "metrics.json").read_text())
    assert counted["images_seen"] == 12
    assert steps_done(folder) == [0, 1, 2] and steps_done(interrupted) == [0, 1, 2]
    said = refusal("train_backbone", *own, "seed=1", f"output={folder}")
    assert "was made with seed=0, not 1" in said


def test_the_target_mixes_label_and_teacher(monkeypatch):
    config = composed("train_backbone", *TINY, "mixup=0", "distillation=0.25")
    classifier = train_backbone.Classifier(config)
    monkeypatch.setattr(classifier, "log", lambda *args, **options: None)
    batch = {"image": torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)}
    batch["label"] = torch.tensor([1, 2, 3, 4])
    images = from_uint8(batch["image"])
    student = classifier.model(classifier.backbone.normalize(images)).log_softmax(1)
    teacher = classifier.teacher.classify(images).softmax(1)
    loss = classifier.training_step(batch, 0)
    expected = -sum(
        0.75 * student[i, i + 1] + 0.25 * (teacher[i] * student[i]).sum() for i in range(4)
    )
    assert torch.allclose(loss, expected / 4, atol=1e-5)
    config.num_classes = 7
    with pytest.raises(InputError, match="has 10 classes: expected the same, or distillation=0"):
        train_backbone.Classifier(config)


def test_random_views_depend_on_the_sample_only():
    def view(first: int) -> torch.Tensor:
        transform = create_transform(32, is_training=True, use_prefetcher=True, color_jitter=0.3)
        image = Image.new("RGB", (40, 40), (200, 30, 90))
        image.paste((0, 255, 0), (5, 5, 20, 30))
        torch.manual_seed(first)  # earlier draws
        return train_backbone.augmented_view(image, torch.Generator().manual_seed(11), transform)

    assert torch.equal(view(0), view(1))
    assert view(0).dtype == torch.uint8 and view(0).shape == (3, 32, 32)
