"""Reconstructions side by side: an original in each row, a model or a method in each column.

A model of several layers has a column for each.

python experiments/gallery.py checkpoints=[RUN,RUN] data=imagenette data.root=PATH
python experiments/gallery.py 'methods={plain: {checkpoint: RUN},
    guided: {checkpoint: RUN, sampler: {feature_guidance_scale: 10}}}' data=photos

The images are not picked: they are the first of each class, in the order of the data set. All
columns share the seed. A cell's cosine is between original and reconstruction in the features of
the column's own backbone.
"""

from omegaconf import DictConfig
from tqdm.auto import tqdm

import harness
from drawing import FIRST_OF_EACH_CLASS, first_of_each_class, reconstruct
from featinv.cli.app import make_batches, run_entry_point
from featinv.evaluation.tables import bullets
from settings import each_layer, find_settings, open_setting


def main(config: DictConfig) -> None:
    """Draw every column, write figure and table."""
    columns, captions = {}, []
    settings = each_layer(find_settings(config), config.layer)
    for setting in tqdm(settings, unit="column", desc="gallery"):
        model, model_config, sampling = open_setting(setting, config)
        batch = first_of_each_class(make_batches(model_config, model), config.num_pictures)
        columns[setting.name] = reconstruct(model, batch, model_config)
        layer = f"{model.backbone.name}, layer {model.backbone.layer}"
        captions.append(f"{setting.name}: {layer}, {model.conditioning} conditioning; {sampling}.")
    title = f"Reconstructions of {FIRST_OF_EACH_CLASS}; seed {config.seed} in every column"
    figure = harness.beside_originals(batch["image"], columns)
    harness.save_pictures(figure, f"{config.output}/gallery.png", title, batch["key"])
    rows = [
        {"image": key} | {name: f"{cosine[i]:.3f}" for name, (_, cosine) in columns.items()}
        for i, key in enumerate(batch["key"])
    ]
    about = (
        "Spatial cosine of reconstruction and original in the features of the column's own "
        f"backbone. The images: {FIRST_OF_EACH_CLASS}. One sample each, seed {config.seed}.\n\n"
        f"{bullets(captions)}"
    )
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "gallery")
