"""The data modules inside Lightning's trainer and Hydra's configs."""

from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from data.conftest import make_shards
from data.test_pictures import folder_of
from featinv.data import FolderDataModule, ShardsDataModule

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


class Recorder(L.LightningModule):
    """Trains one number; saves a checkpoint and which samples came, on each rank."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.evaluated = [], []

    def training_step(self, batch, _):
        self.trained += batch["index"].tolist()
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch, _):
        self.evaluated += batch["index"].tolist()

    def on_train_end(self):
        folder = Path(self.trainer.default_root_dir)
        self.trainer.save_checkpoint(folder / "last.ckpt")
        samples = {"trained": self.trained, "evaluated": self.evaluated}
        torch.save(samples, folder / f"samples-{self.global_rank}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, folder, steps, checkpoint=None, **options):
    """Train; return the numbers of the samples that each rank trained on, and evaluated on."""
    trainer = L.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"val_check_interval": 2, "num_sanity_val_steps": 0} | options,
    )
    trainer.fit(Recorder(), module, ckpt_path=checkpoint)
    ranks = [
        torch.load(folder / f"samples-{rank}.pt", weights_only=True)
        for rank in range(trainer.world_size)
    ]
    return [rank["trained"] for rank in ranks], [rank["evaluated"] for rank in ranks]


@pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice on workers and progress bars
@pytest.mark.parametrize(("kind", "world"), [("folder", 1), ("shards", 2)])
def test_a_resumed_run_continues_the_stream(tmp_path, kind, world):
    options = {"image_size": 8, "batch_size": 2}
    if kind == "folder":
        root = folder_of(folder_of(tmp_path, "ab"), "ab", split="val")
        make = lambda: FolderDataModule(root, **options)  # noqa: E731
    else:
        make_shards(tmp_path, "train", [9, 9, 7, 8])
        make_shards(tmp_path, "val", [8])
        names = {"train_shards": "train-*.tar", "val_shards": "val-*.tar", "root": tmp_path}
        options |= {"num_workers": 2, **names}
        make = lambda: ShardsDataModule(**options)  # noqa: E731
    ranks = {"strategy": "ddp_fork", "devices": 2} if world > 1 else {}
    whole, evaluated = fit(make(), tmp_path, 6, **ranks)
    assert sorted(sum(whole, [])) == list(range(6 * 2 * 2 * world))
    assert evaluated == [list(range(rank, 8, world)) * 6 for rank in range(world)]
    start, _ = fit(make(), tmp_path, 3, **ranks)
    saved = (tmp_path / "last.ckpt").rename(tmp_path / "saved.ckpt")
    rest, _ = fit(make(), tmp_path, 6, saved, **ranks)
    assert [a + b for a, b in zip(start, rest, strict=True)] == whole
    if kind == "folder":
        epochs, _ = fit(make(), tmp_path, 6, limit_train_batches=4)
        assert epochs == whole  # an epoch starts no new stream


def test_each_config_builds_its_module(tmp_path):
    for name in ("imagenette-train", "imagenette-val"):
        make_shards(tmp_path, name, [2, 2])
    local, shards = [f"data.root={tmp_path}"], "imagenette-val-*.tar"
    given = {
        "photos": [],
        "folder": local,
        "imagenette": local,
        "imagenet": ["data.root=https://localhost/imagenet"],
        "shards": [*local, f"data.train_shards={shards}", f"data.val_shards={shards}"],
    }
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(given)
    modules = {}
    with initialize_config_dir(str(CONFIGS.parent), version_base=None):
        for name, own in given.items():
            overrides = [f"data={name}", "data.image_size=24", "seed=5", *own]
            modules[name] = instantiate(compose("train", overrides).data)
            assert (modules[name].image_size, modules[name].seed) == (24, 5)
    imagenet = modules["imagenet"]
    assert (len(imagenet.train_shards), len(imagenet.val_shards)) == (1024, 64)
    assert imagenet.val_shards[-1].endswith("/imagenet/imagenet1k-validation-63.tar")
