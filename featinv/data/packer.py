"""Pack class folders of images into WebDataset shards: `featinv-convert pack`."""

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import webdataset as wds
from PIL import Image
from tqdm import tqdm

from featinv.data.base import report_broken
from featinv.data.folder import class_folders, existing_folder, list_pictures
from featinv.data.pictures import Picture
from featinv.utils.errors import InputError, at_least
from featinv.utils.seeding import Draw, make_generator


def pack(
    source: str | Path,
    out_prefix: str | Path,
    *,
    size: int = 224,
    samples_per_shard: int = 1000,
    quality: int = 95,
    seed: int = 0,
) -> list[Path]:
    """Write `OUT_PREFIX-0000.tar`, ... with KEY.jpg and KEY.cls, and `OUT_PREFIX-classes.json`.

    The samples are shuffled. Shards are moved to their place once all are complete, so an
    interruption leaves none. Unreadable images are skipped and named.

    Args:
        source: Folder of class folders, whose alphabetical order numbers the classes.
        out_prefix: Path and beginning of the shards' names.
        size: Larger images are shrunk to a shorter side of this many pixels.
        samples_per_shard: Fewer are in the last one.
        quality: JPEG quality, 1 to 100.
        seed: Determines the order.

    Raises:
        InputError: An option is out of range, no image can be read, or the shards exist already.
    """
    at_least("size", size, 8)
    at_least("samples_per_shard", samples_per_shard, 1)
    at_least("seed", seed, 0)
    if not 1 <= quality <= 100:
        raise InputError(f"quality is {quality}: expected 1 to 100, for example 95.")
    prefix = Path(out_prefix).expanduser()
    if old := sorted(prefix.parent.glob(f"{prefix.name}-*.tar")):
        raise InputError(f"'{old[0]}' exists already: remove the old shards or choose a new name.")
    folder = existing_folder(source)
    pictures = list_pictures(folder)
    order = torch.randperm(len(pictures), generator=make_generator(seed, Draw.ORDER)).tolist()

    prefix.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=prefix.parent, prefix=".packing-") as partial:
        pattern = f"{partial}/{prefix.name}".replace("%", "%%") + "-%04d.tar"
        with wds.ShardWriter(pattern, samples_per_shard, verbose=0, mtime=0) as writer:
            for sample in _encode([pictures[i] for i in order], size, quality):
                writer.write(sample)
            if writer.total == 0:
                raise InputError(f"None of the {len(pictures)} images in '{folder}' can be read.")
        names = dict(enumerate(class_folders(folder)))
        prefix.with_name(f"{prefix.name}-classes.json").write_text(json.dumps(names, indent=1))
        return [path.rename(prefix.parent / path.name) for path in sorted(Path(partial).iterdir())]


def _encode(pictures: Sequence[Picture], size: int, quality: int) -> Iterator[dict]:
    unreadable = []
    for number, picture in enumerate(tqdm(pictures, unit="img", desc="packing")):
        try:
            image = picture.open()
        except InputError:
            unreadable.append(picture.key)
            continue
        shorter = min(image.size)
        if shorter > size:
            scaled = [max(1, round(side * size / shorter)) for side in image.size]
            image = image.resize(scaled, Image.Resampling.BICUBIC)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=quality)
        # A dot or slash would end the key; the number tells 'a.jpg' from 'a.png'.
        name = re.sub(r"[./\s]+", "_", str(Path(picture.key).with_suffix("")))
        yield {"__key__": f"{number:07d}_{name}", "jpg": jpeg.getvalue(), "cls": picture.label}
    report_broken(unreadable)
