"""Pictures in class folders, or a list of image files."""

from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from featinv.data.pictures import Picture, PictureDataModule
from featinv.utils.errors import InputError, listing
from featinv.utils.files import describe_folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class FolderDataModule(PictureDataModule):
    """Class folders of image files, `root/train/CLASS/*` and `root/val/CLASS/*`.

    A root without `train` and `val` is for evaluation only: `root/CLASS/*`, or files directly in
    `root`, with label -1. Labels number the class folders alphabetically, those of `train` if it
    exists. Keys are paths relative to the split's folder. Unreadable files are skipped, counted and
    named; more than 5 % of them are an error.

    Args:
        root: The folder.
        **options: See `ImageDataModule`.

    Raises:
        InputError: The folder is missing; later, a split or all of its images are.
    """

    def __init__(self, root: str | Path, **options: Any) -> None:
        super().__init__(**options)
        self.root = existing_folder(root)

    def train_pictures(self) -> list[Picture]:
        """Return the pictures of `root/train`."""
        folder = self.root / "train"
        if not folder.is_dir():
            raise InputError(
                f"Cannot train on '{self.root}': expected 'train' and 'val' with class folders in "
                f"it, but {describe_folder(self.root)}; it can only be evaluated on."
            )
        return list_pictures(folder)

    def eval_pictures(self) -> list[Picture]:
        """Return the pictures of `root/val`, or of `root` without splits."""
        train, val = self.root / "train", self.root / "val"
        if val.is_dir():
            return list_pictures(val, class_folders(train) if train.is_dir() else None)
        if train.is_dir():
            raise InputError(
                f"Cannot evaluate on '{self.root}': expected 'val' beside 'train', but "
                f"{describe_folder(self.root)}."
            )
        return list_pictures(self.root)


def list_images(images: str | Path | Sequence[str | Path]) -> list[Picture]:
    """List image files, to invert rather than to train on.

    Args:
        images: A path, a folder or a pattern such as `photos/*.jpg`, or several.

    Returns:
        Pictures with label -1. Their key is the file's name without suffix, or its path where two
        files share a name.

    Raises:
        InputError: A pattern matches nothing.
    """
    patterns = [images] if isinstance(images, str | Path) else images
    paths = [path for pattern in patterns for path in match_images(pattern)]
    names = Counter(path.stem for path in paths)
    return [Picture(p.stem if names[p.stem] == 1 else str(p), -1, p) for p in paths]


def match_images(pattern: str | Path) -> list[Path]:
    """Return the files that a path, folder or glob pattern names, sorted."""
    path = Path(pattern).expanduser()
    # A file may be called 'a[1].jpg': an existing path is no pattern.
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else map(Path, glob(str(path), recursive=True))
    files = sorted(file for file in found if is_image(file))
    if not files:
        folder = path if path.is_dir() else path.parent
        raise InputError(f"'{pattern}' matches no image file: {describe_folder(folder)}.")
    return files


def list_pictures(folder: Path, classes: Sequence[str] | None = None) -> list[Picture]:
    """List a folder's pictures, class by class.

    Args:
        folder: Holds class folders, or the pictures themselves (label -1).
        classes: Names of the classes in the order of their labels; the class folders if None.

    Raises:
        InputError: There is no picture, or a class that is not in `classes`.
    """
    found = class_folders(folder)
    classes = found if classes is None else classes
    if unseen := sorted(set(found) - set(classes)):
        raise InputError(
            f"'{folder}' has classes that the training folder lacks: {listing(unseen)}; "
            f"expected some of {listing(classes)}."
        )
    labels = {name: classes.index(name) for name in found} or {".": -1}
    pictures = [
        Picture(path.relative_to(folder).as_posix(), label, path)
        for name, label in labels.items()
        for path in sorted((folder / name).rglob("*") if found else folder.iterdir())
        if is_image(path)
    ]
    if not pictures:
        raise InputError(f"No images in '{folder}': {describe_folder(folder)}.")
    return pictures


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted."""
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(name for name in names if not name.startswith("."))


def is_image(path: Path) -> bool:
    """Return whether a path is a visible file with the suffix of an image."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def existing_folder(root: str | Path) -> Path:
    """Return a folder's path, or raise an `InputError` that says what exists instead."""
    path = Path(root).expanduser()
    if not path.is_dir():
        raise InputError(f"Folder '{root}' does not exist: {describe_folder(path)}.")
    return path
