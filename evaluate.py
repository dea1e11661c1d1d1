"""Score a trained FeatInv on a data set, or invert one's own photographs.

python evaluate.py checkpoint=RUN data=imagenette data.root=PATH
python evaluate.py checkpoint=RUN images='path/*.jpg' num_samples=4
"""

import logging
from collections.abc import Iterable

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from featinv import FeatInv
from featinv.cli import run_entry_point
from featinv.data import ImageFiles
from featinv.errors import InputError
from featinv.evaluation import Evaluation
from featinv.report import markdown_table

log = logging.getLogger("evaluate")


def check_backbone(model: FeatInv, expected: DictConfig | str) -> None:
    """Raise an `InputError` if the checkpoint was made for another backbone than was asked for."""
    backbone = model.backbone
    for key, value in OmegaConf.to_container(expected).items():
        if value is not None and value != getattr(backbone, key):
            raise InputError(
                f"backbone.{key} is {value}, but the checkpoint was trained with "
                f"{getattr(backbone, key)} ({backbone.name}, layer {backbone.layer}, "
                f"{backbone.image_size} px)."
            )


def make_batches(config: DictConfig, image_size: int) -> Iterable[dict]:
    """Return the batches of the data set, or of the image files, that the config names."""
    if config.images is None:
        config.backbone.image_size = image_size
        return instantiate(config.data, max_images=config.num_images).test_dataloader()
    return DataLoader(ImageFiles(config.images, image_size), batch_size=8)


@hydra.main(version_base=None, config_path="configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Load, evaluate, write the table, the numbers and the picture."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = FeatInv.load(config.checkpoint).to(device)
    check_backbone(model, config.backbone)
    evaluation = Evaluation(
        model,
        config.num_samples,
        config.seed,
        config.batch_size,
        config.num_pictures,
        OmegaConf.to_container(config.sampler),
    )
    try:
        evaluation.run(make_batches(config, model.backbone.image_size))
    finally:  # whatever was computed is written down, even if the data turn out to be broken
        if evaluation.keys:
            about = {"checkpoint": str(config.checkpoint), "images": config.images}
            evaluation.save(config.output, **about)
            log.info("Table, numbers and picture are in %s", config.output)
    print(f"\n{markdown_table(evaluation.table_rows())}\n\n{evaluation.caption()}")


if __name__ == "__main__":
    run_entry_point(main, "evaluate")
