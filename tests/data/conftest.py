"""Small pictures, shards and helpers that the data tests share."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featinv.data.base import Shares


def jpeg(number: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """Encode a smooth random picture that is different for every number."""
    rough = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, bytes], label: str | None = "7") -> None:
    with tarfile.open(path, "w") as tar:
        for key, image in samples.items():
            members = {f"{key}.jpg": image}
            if label is not None:
                members[f"{key}.cls"] = label.encode()
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def make_shards(folder: Path, name: str, counts: list[int]) -> list[str]:
    """Write shards of so many samples; keys are `name-shard-number`."""
    for shard, number in enumerate(counts):
        samples = {f"{name}-{shard}-{i}": jpeg(100 * shard + i) for i in range(number)}
        write_shard(folder / f"{name}-{shard:04d}.tar", samples)
    return [f"{name}-{s}-{i}" for s, number in enumerate(counts) for i in range(number)]


def train_batches(module, number: int, rank: int = 0, world: int = 1, first: int = 0) -> list[dict]:
    batches = iter(module.make_train_loader(Shares(rank, world), lambda: first))
    return [next(batches) for _ in range(number)]


def eval_batches(module, rank: int = 0, world: int = 1, limit: int | None = None) -> list[dict]:
    return list(module.make_eval_loader(Shares(rank, world), limit))


def keys_of(batches: list[dict]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def indices_of(batches: list[dict]) -> list[int]:
    return [i for batch in batches for i in batch["index"].tolist()]


def images_of(batches: list[dict]) -> torch.Tensor:
    return torch.cat([batch["image"] for batch in batches])


@pytest.fixture(scope="session")
def imagenette() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "data" / "imagenette"
    if not folder.is_dir():
        pytest.skip(f"no Imagenette shards in {folder}")
    return folder
