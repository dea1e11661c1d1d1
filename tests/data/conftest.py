"""Small pictures, shards and helpers that the data tests share."""

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from featinv.data.base import RankShare


def jpeg(number: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """Encode a smooth random picture that is different for every number."""
    rough = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(
    path: Path, samples: dict[str, bytes], label: str | dict[str, str] | None = "7"
) -> None:
    with tarfile.open(path, "w") as tar:
        for key, image in samples.items():
            members = {f"{key}.jpg": image}
            if label is not None:
                text = label if isinstance(label, str) else label[key]
                members[f"{key}.cls"] = text.encode()
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def make_shards(folder: Path, name: str, counts: list[int]) -> list[str]:
    """Write shards with these numbers of samples; return the keys, `name-shard-number`."""
    for shard, number in enumerate(counts):
        samples = {f"{name}-{shard}-{i}": jpeg(100 * shard + i) for i in range(number)}
        write_shard(folder / f"{name}-{shard:04d}.tar", samples)
    return [f"{name}-{s}-{i}" for s, number in enumerate(counts) for i in range(number)]


def set_trainer(module, rank: int = 0, world: int = 1, accumulate: int = 1) -> SimpleNamespace:
    """Give a data module a stand-in for a trainer before its first step."""
    ranks = {"global_rank": rank, "world_size": world}
    module.trainer = SimpleNamespace(**ranks, accumulate_grad_batches=accumulate, global_step=0)
    module.setup("fit")
    return module.trainer


def train_batches(module, number: int, rank: int = 0, world: int = 1) -> list[dict]:
    set_trainer(module, rank, world)
    batches = iter(module.train_dataloader())
    return [next(batches) for _ in range(number)]


class Training:
    """Trains on a data module's batches without a model.

    As some trainers do, it fetches a batch more than it has trained on.

    Attributes:
        batches: What one rank trained on.
        states: What the data module would have saved before and after each optimiser step.
    """

    def __init__(
        self,
        module,
        steps: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        state: dict | None = None,
    ) -> None:
        trainer = set_trainer(module, rank, world, accumulate)
        if state is not None:
            module.load_state_dict(state)
            trainer.global_step = state["step"]
        batches = iter(module.train_dataloader())
        fetched = [next(batches)]
        self.states = [module.state_dict()]
        for _ in range(steps):
            fetched += [next(batches) for _ in range(accumulate)]
            assert module.state_dict() == self.states[-1]  # until the optimiser has stepped
            trainer.global_step += 1
            self.states.append(module.state_dict())
        self.batches = fetched[:-1]


def eval_batches(module, rank: int = 0, world: int = 1, limit: int | None = None) -> list[dict]:
    return list(module.make_eval_loader(RankShare(rank, world), limit))


def keys_of(batches: list[dict]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def indices_of(batches: list[dict]) -> list[int]:
    return [i for batch in batches for i in batch["index"].tolist()]


def images_of(batches: list[dict]) -> torch.Tensor:
    return torch.cat([batch["image"] for batch in batches])
