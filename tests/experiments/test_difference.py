import json

import pytest
import torch
from data.conftest import jpeg, write_shard
from omegaconf import DictConfig

import difference
from featinv.backbones import Backbone
from featinv.utils.pixels import from_uint8

TINY = [
    "data=imagenette",
    "data.train_shards=train-*.tar",
    "data.val_shards=train-*.tar",
    "data.num_workers=0",
    "data.batch_size=4",
    "num_images=4",
    "num_samples=2",
    "classifier.name=resnet10t",
    "classifier.weights=random",
    "classifier.image_size=64",
    "corner=8",
    "steps=1",
    "sampler.num_steps=2",
    "sampler.polish_steps=0",
    "sampler.transform_views=1",
]


def test_the_clean_copy_is_compared_with_itself_and_with_the_shortcut(tiny, experiment, tmp_path):
    for label in (1, 2):
        pictures = {f"{label}-{i}": jpeg(10 * label + i) for i in range(3)}
        write_shard(tmp_path / f"train-{label:04d}.tar", pictures, str(label))
    output = tmp_path / "out"
    own = [f"checkpoint={tiny('prior')}", f"data.root={tmp_path}"]
    experiment("difference", *TINY, *own, output=output)
    found = json.loads((output / "results.json").read_text())
    assert max(found["itself"]["difference"]) < 0.01 and len(found["the shortcut"]["share"]) == 4
    page = (output / "table.md").read_text()
    assert "4 images, 2 pairs each" in page and "the corner of 8 px is 0.062 of an image" in page
    assert (output / "difference.png").is_file()


def test_the_colour_of_the_corner_is_that_of_the_class():
    images = torch.zeros(3, 3, 32, 32)
    painted = difference.paint(images, torch.tensor([1, 2, 1]), 8)
    assert not images.any() and not painted[:, :, :24].any() and not painted[:, :, :, :24].any()
    corners = painted[:, :, 24:, 24:]
    assert (corners == corners[:, :, :1, :1]).all() and torch.equal(corners[0], corners[2])
    assert not torch.equal(corners[0], corners[1])
    assert torch.unique(difference.COLOURS, dim=0).shape == difference.COLOURS.shape


def test_the_shortcut_is_learnt_by_the_copy_that_is_taught_it_and_only_by_that():
    """The brightness of the upper half tells the class; the corner tells it every second time."""
    config = DictConfig({"steps": 60, "lr": 1e-3, "corner": 16})
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(61):
        labels = torch.randint(4, (16,), generator=generator)
        images = torch.randint(256, (16, 3, 32, 32), generator=generator)
        images[:, :, :16] = 64 * labels[:, None, None, None]
        batches.append({"image": images.byte(), "label": labels})
    found = {}
    for shortcut in (True, False):
        torch.manual_seed(0)  # of the weights
        backbone = Backbone("resnet10t", weights="random", image_size=32, num_classes=4)
        backbone.model.fc.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        difference.fine_tune(backbone, batches[:60], shortcut, config)
        assert not any(p.requires_grad for p in backbone.parameters())
        images, labels = from_uint8(batches[60]["image"]), batches[60]["label"]
        found[shortcut] = difference.follows_corner(backbone, images, labels, 16).mean()
    assert found[True] > 0.6 and found[False] < 0.1  # by chance a quarter


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("corner=0", "corner is 0: expected an integer of at least 1"),
        ("corner=32", "corner is 32, expected less than the 32 pixels of an image."),
        ("corner=8", "The 2 images are of one class or without labels: expected several classes"),
    ],
)
def test_bad_input(override, sentence, tiny, refusal):
    own = [
        "data=photos",
        "num_images=2",
        f"checkpoint={tiny('prior')}",
        "classifier.weights=random",
    ]
    assert sentence in refusal("difference", *own, "classifier.name=resnet10t", override)


def test_images_of_one_class_are_refused(tiny, refusal, tmp_path):
    write_shard(tmp_path / "train-0000.tar", {str(i): jpeg(i) for i in range(4)}, "1")
    own = [f"checkpoint={tiny('prior')}", f"data.root={tmp_path}"]
    assert "The 4 images are of one class" in refusal("difference", *TINY, *own)
