"""The data modules inside Lightning's trainer and Hydra's configs."""

from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from data.conftest import indices_of, make_shards
from data.test_pictures import folder_of
from featinv.data import FolderDataModule, PhotosDataModule, ShardsDataModule

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


class Recorder(L.LightningModule):
    """Trains one number and remembers which samples came."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.evaluated = [], []

    def training_step(self, batch, _):
        self.trained += batch["index"].tolist()
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch, _):
        self.evaluated += batch["index"].tolist()

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, folder, steps, checkpoint=None, **options):
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
    recorder = Recorder()
    trainer.fit(recorder, module, ckpt_path=checkpoint)
    return trainer, recorder


@pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice on workers and progress bars
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_resumed_run_goes_on_in_the_stream(tmp_path, kind):
    if kind == "folder":
        root = folder_of(folder_of(tmp_path, "ab"), "ab", split="val")
        make = lambda: FolderDataModule(root, image_size=8, batch_size=2)  # noqa: E731
    else:
        make_shards(tmp_path, "train", [9, 9])
        make_shards(tmp_path, "val", [8])
        names = {"train_shards": "train-*.tar", "val_shards": "val-*.tar"}
        make = lambda: ShardsDataModule(  # noqa: E731
            root=tmp_path, **names, image_size=8, batch_size=2, num_workers=2
        )
    _, whole = fit(make(), tmp_path, 6)
    assert len(whole.trained) == 6 * 2 * 2
    assert whole.evaluated == list(range(8)) * 6  # every two batches, whole and in order
    trainer, start = fit(make(), tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, rest = fit(make(), tmp_path, 6, tmp_path / "last.ckpt")
    assert start.trained + rest.trained == whole.trained
    _, epochs = fit(make(), tmp_path, 6, limit_train_batches=4)  # an epoch starts no new stream
    assert epochs.trained == whole.trained


def compose(name, **given):
    base = {"seed": 5, "backbone": {"image_size": 24}}
    loaded = OmegaConf.load(CONFIGS / f"{name}.yaml")
    return OmegaConf.create({**base, "data": OmegaConf.merge(loaded, given)}).data


def test_configs_make_their_modules(tmp_path):
    folder_of(folder_of(tmp_path, "ab"), "ab", split="val")
    for name in ("s", "imagenette-train", "imagenette-val"):
        make_shards(tmp_path, name, [2, 2])
    given = {
        "photos": (PhotosDataModule, {}),
        "folder": (FolderDataModule, {"root": str(tmp_path)}),
        "imagenette": (ShardsDataModule, {"root": str(tmp_path)}),
        "imagenet": (ShardsDataModule, {"root": "https://localhost/imagenet"}),
        "shards": (
            ShardsDataModule,
            {"root": str(tmp_path), "train_shards": "s-*.tar", "val_shards": "s-*.tar"},
        ),
    }
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(given)
    for name, (kind, options) in given.items():
        module = instantiate(compose(name, num_workers=0, batch_size=2, **options))
        assert type(module) is kind and module.image_size == 24 and module.seed == 5
        if name != "imagenet":
            for loader in (module.train_dataloader(), module.val_dataloader()):
                batch = next(iter(loader))
                assert batch["image"].shape == (2, 3, 24, 24)
                assert indices_of([batch])[0] == 0
        else:
            assert len(module.train_shards) == 1024 and len(module.val_shards) == 64
            assert module.val_shards[-1].endswith("/imagenet/imagenet1k-validation-63.tar")
        if "root" in options and name != "shards":
            with pytest.raises(MissingMandatoryValue, match="root"):
                compose(name).root  # noqa: B018
