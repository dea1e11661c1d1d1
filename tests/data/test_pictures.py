"""Photos and folders: the stream depends on the seed alone, evaluation is exact."""

import logging
import pickle

import pytest
import torch

from data.conftest import (
    eval_batches,
    images_of,
    indices_of,
    jpeg,
    keys_of,
    train_batches,
)
from featinv.data import FolderDataModule, PhotosDataModule, folder
from featinv.data.folder import list_images
from featinv.utils.errors import InputError


def folder_of(root, classes, per_class=4, split="train"):
    for c, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for i in range(per_class):
            (root / split / name / f"{i}.jpg").write_bytes(jpeg(10 * c + i))
    return root


def module_of(root, **options):
    return FolderDataModule(root, **{"image_size": 8, "batch_size": 2, "seed": 3} | options)


def test_stream_depends_on_the_seed_alone(tmp_path):
    root = folder_of(tmp_path, "abc", per_class=3)
    whole = train_batches(module_of(root, batch_size=24), 1)
    assert indices_of(whole) == list(range(24))
    assert sorted(keys_of(whole)[:9]) == sorted(keys_of(whole)[9:18]) == sorted({*keys_of(whole)})
    assert keys_of(whole)[:9] != keys_of(whole)[9:18]  # a new order every epoch
    assert len({image.numpy().tobytes() for image in images_of(whole)}) == 24  # and new crops
    for world, batch_size, workers in [(3, 2, 0), (2, 3, 1)]:
        module = module_of(root, batch_size=batch_size, num_workers=workers)
        steps = 24 // (world * batch_size)
        ranks = [train_batches(module, steps, rank, world) for rank in range(world)]
        joined = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert indices_of(joined) == list(range(24))
        assert keys_of(joined) == keys_of(whole)
        assert torch.equal(images_of(joined), images_of(whole))
    other = train_batches(module_of(root, batch_size=24, seed=4), 1)
    assert keys_of(other) != keys_of(whole)


def test_workers_may_be_spawned(tmp_path):
    """As on macOS, which pickles the data set for each of them."""
    pictures = module_of(folder_of(tmp_path, "ab")).train_dataloader().dataset
    assert pictures[5][0]["key"] == pickle.loads(pickle.dumps(pictures))[5][0]["key"]


def test_evaluation_is_exact(tmp_path):
    world = 3
    folder_of(tmp_path, "abc", per_class=5, split="val")
    module = module_of(tmp_path, num_workers=1)
    ranks = [eval_batches(module, rank, world) for rank in range(world)]
    for rank, batches in enumerate(ranks):
        assert indices_of(batches) == list(range(rank, 15, world))
    by_index = {i: k for b in ranks for i, k in zip(indices_of(b), keys_of(b), strict=True)}
    assert [by_index[i] for i in range(15)] == [f"{c}/{i}.jpg" for c in "abc" for i in range(5)]
    limited = [i for rank in range(world) for i in indices_of(eval_batches(module, rank, world, 6))]
    assert sorted(limited) == [0, 2, 5, 7, 10, 12]  # evenly spaced: two of each class


def test_labels_follow_the_training_folders(tmp_path):
    folder_of(folder_of(tmp_path, "abc"), "c", split="val")
    assert {batch["label"].unique().item() for batch in eval_batches(module_of(tmp_path))} == {2}
    (tmp_path / "val" / "d").mkdir()
    with pytest.raises(InputError, match="lacks: d;"):
        eval_batches(module_of(tmp_path))


def test_a_folder_without_splits_is_for_evaluation_only(tmp_path):
    for name in ("x.jpg", "y.JPG", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(jpeg(1))
    (batch,) = eval_batches(module_of(tmp_path))
    assert batch["key"] == ["x.jpg", "y.JPG"] and batch["label"].tolist() == [-1, -1]
    with pytest.raises(InputError, match="'train' and 'val'.*holds .hidden.jpg, notes.txt, x.jpg"):
        train_batches(module_of(tmp_path), 1)
    with pytest.raises(InputError, match="nearest existing folder, '.*holds"):
        module_of(tmp_path / "no" / "such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="No images in .*holds nothing"):
        eval_batches(module_of(tmp_path / "empty"))


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    listed, list_pictures = [], folder.list_pictures

    def list_and_count(path, *options):
        listed.append(path.name)
        return list_pictures(path, *options)

    monkeypatch.setattr(folder, "list_pictures", list_and_count)
    module = module_of(folder_of(folder_of(tmp_path, "ab"), "ab", split="val"))
    assert module.epoch_size() == 8
    module.train_dataloader(), module.val_dataloader(), module.test_dataloader()
    assert listed == ["train", "val"]


def test_few_broken_files_are_skipped_and_named(tmp_path, caplog):
    root = folder_of(folder_of(tmp_path, "ab", 12), "ab", 12, split="val")
    for split in ("train", "val"):
        (root / split / "b" / "3.jpg").write_bytes(b"")
    module = module_of(root, num_workers=1)
    with caplog.at_level(logging.WARNING):
        batches = eval_batches(module)
    assert indices_of(batches) == [i for i in range(24) if i != 17]  # 3.jpg comes after 10.jpg
    assert "Skipped 1 unreadable samples: b/3.jpg" in caplog.text
    caplog.clear()
    batches = train_batches(module, 12)
    assert all(len(batch["key"]) == 2 for batch in batches)  # replaced, so batches stay full
    assert indices_of(batches) == list(range(24)) and "b/3.jpg" not in keys_of(batches)
    assert "b/3.jpg" in caplog.text


def test_too_many_broken_files_are_an_error(tmp_path):
    root = folder_of(folder_of(tmp_path, "a", 12), "a", 12, split="val")
    for name in ("3.jpg", "4.jpg"):
        (root / "val" / "a" / name).write_bytes(b"x")
        (root / "train" / "a" / name).write_bytes(b"x")
    expected = r"^\d+ of \d+ samples cannot be read, more than 5%: a/3.jpg, a/4.jpg; "
    with pytest.raises(InputError, match=expected):
        eval_batches(module_of(root))
    with pytest.raises(InputError, match="samples cannot be read, more than 5%"):
        train_batches(module_of(root), 40)
    for file in (root / "train" / "a").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match="^12 pictures in a row cannot be read"):
        train_batches(module_of(root, num_workers=1), 1)  # one sentence, though from a worker


def test_image_files(tmp_path):
    for name in ("b.jpg", "a.jpg", "c[1].jpg"):
        (tmp_path / name).write_bytes(jpeg(len(name)))
    pictures = list_images(str(tmp_path / "*.jpg"))
    assert [(picture.key, picture.label) for picture in pictures] == [
        ("a", -1),
        ("b", -1),
        ("c[1]", -1),
    ]
    assert [picture.key for picture in list_images(tmp_path / "c[1].jpg")] == ["c[1]"]
    several = list_images([str(tmp_path), tmp_path / "a.jpg"])
    assert [p.key for p in several] == [str(tmp_path / "a.jpg"), "b", "c[1]", several[0].key]
    with pytest.raises(InputError, match=r"\*.png' matches no image file: folder .* holds a.jpg"):
        list_images(str(tmp_path / "*.png"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size is 0: .*at least 1"),
        ({"min_scale": 1.5}, "min_scale is 1.5: .*up to 1"),
        ({"interpolation": "bilnear"}, "Unknown interpolation 'bilnear': did you mean bilinear"),
    ],
)
def test_bad_options_are_errors(options, sentence):
    with pytest.raises(InputError, match=sentence):
        PhotosDataModule(**{"image_size": 8, "batch_size": 1} | options)


def test_per_class_takes_the_first_of_each_class(tmp_path):
    folder_of(tmp_path, "abc", per_class=5, split="val")
    batches = eval_batches(module_of(tmp_path, per_class=2))
    assert keys_of(batches) == [f"{c}/{i}.jpg" for c in "abc" for i in range(2)]
    assert indices_of(batches) == list(range(6))
    assert keys_of(eval_batches(module_of(tmp_path, per_class=2), limit=3)) == [
        f"{c}/0.jpg" for c in "abc"
    ]


def test_three_photographs_are_held_out():
    module = PhotosDataModule(image_size=32, batch_size=26, crops_per_photo=2)
    train = keys_of([next(iter(module.train_dataloader()))])
    assert len(set(train)) == 13 and not {"chelsea", "coffee", "flower"} & set(train)
    (batch,) = module.test_dataloader()
    names = ["chelsea", "coffee", "flower"]
    assert batch["key"] == [f"{name}/{crop}" for crop in (0, 1) for name in names]
    assert batch["photograph"] == names * 2
    assert batch["image"].float().flatten(1).std(dim=1).min() > 20  # pictures, not flat patches
    reseeded = PhotosDataModule(image_size=32, batch_size=26, crops_per_photo=2, seed=9)
    assert torch.equal(next(iter(reseeded.test_dataloader()))["image"], batch["image"])
