"""Reconstructions side by side: an original in each row, a model or a method in each column.

python experiments/gallery.py checkpoints=[RUN,RUN] data=imagenette data.root=PATH
python experiments/gallery.py 'methods={plain: {checkpoint: RUN},
    guided: {checkpoint: RUN, sampler: {feature_guidance_scale: 10}}}' data=photos

Nobody picks the images: they are the first of each class, in the order of the data set. All columns
have the same seed; a cell's cosine is between the features that its model's own backbone sees in
the original and in the reconstruction.
"""

from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

import harness
from featinv.cli.app import make_batches, run_entry_point
from featinv.evaluation.figures import columns_figure, save_figure
from featinv.evaluation.tables import bullets
from featinv.utils.errors import at_least
from settings import find_settings, open_setting


def main(config: DictConfig) -> None:
    """Draw every column, write figure and table."""
    at_least("num_pictures", config.num_pictures, 1)
    columns: dict[str, tuple[Tensor, Tensor]] = {}
    how = []
    for setting in tqdm(find_settings(config), unit="column", desc="gallery"):
        model, own, sampling = open_setting(setting, config)
        batch = harness.pick(make_batches(own, model), config.num_pictures)
        columns[setting.name] = harness.reconstruct(model, batch, own)
        where = f"{model.backbone.name}, layer {model.backbone.layer}"
        how.append(f"{setting.name}: {where}, {model.conditioning} conditioning; {sampling}.")
    title = f"Reconstructions of {harness.FIRST_OF_EACH_CLASS}; seed {config.seed} in every column"
    figure = columns_figure(batch["image"], batch["key"], columns, title)
    save_figure(figure, Path(config.output) / "gallery.png")
    rows = [
        {"image": key} | {name: f"{cosine[i]:.3f}" for name, (_, cosine) in columns.items()}
        for i, key in enumerate(batch["key"])
    ]
    about = (
        "Spatial cosine of the features of reconstruction and original, in the features of the "
        f"column's own backbone. The images: {harness.FIRST_OF_EACH_CLASS}. One sample each, seed "
        f"{config.seed}.\n\n{bullets(how)}"
    )
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "gallery")
