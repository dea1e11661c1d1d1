"""Reconstructions side by side: an original in each row, a model or a method in each column.

python experiments/gallery.py checkpoints=[RUN,RUN] data=imagenette data.root=PATH
python experiments/gallery.py 'methods={plain: {checkpoint: RUN},
    hybrid: {checkpoint: RUN, sampler: {feature_guidance_scale: 0.05}}}' data=photos

Nobody picks the images: they are the first of each class, in the order of the data set. All columns
have the same seed; a cell's cosine is between the features that its model's own backbone sees in
the original and in the reconstruction.
"""

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm.auto import tqdm

from experiments.harness import RULE, find_methods, pick, publish, reconstruct
from featinv import FeatInv
from featinv.cli.app import make_batches, run_entry_point, sampler_options
from featinv.evaluation.figures import columns_figure, save_figure
from featinv.evaluation.tables import bullets
from featinv.utils.devices import pick_device
from featinv.utils.errors import at_least

log = logging.getLogger("gallery")


def main(config: DictConfig) -> None:
    """Draw every column, write figure and table."""
    at_least("num_pictures", config.num_pictures, 1)
    columns: dict[str, tuple[Tensor, Tensor]] = {}
    methods, how = find_methods(config), []
    for name, (checkpoint, values) in tqdm(methods.items(), unit="column", desc="gallery"):
        changed = OmegaConf.merge(config, {"sampler": values})
        model = FeatInv.load(checkpoint).to(pick_device(config.device))
        batch = pick(make_batches(changed, model), config.num_pictures)
        columns[name] = reconstruct(name, model, batch, changed)
        settings = model.settings(**sampler_options(changed)).describe()
        where = f"{model.backbone.name}, layer {model.backbone.layer}"
        how.append(f"{name}: {where}, {model.conditioning} conditioning; {settings}.")
    output = Path(config.output)
    title = f"Reconstructions of {RULE}; seed {config.seed} in every column"
    save_figure(
        columns_figure(batch["image"], batch["key"], columns, title), output / "gallery.png"
    )
    rows = [
        {"image": key} | {name: f"{cosine[i]:.3f}" for name, (_, cosine) in columns.items()}
        for i, key in enumerate(batch["key"])
    ]
    about = (
        "Spatial cosine of the features of reconstruction and original, in the features of the "
        f"column's own backbone. The images: {RULE}. One sample each, seed {config.seed}.\n\n"
        f"{bullets(how)}"
    )
    publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "gallery")
