"""Fit probes to an encoder's pooled features: what classes do they hold?

python experiments/probe.py checkpoint=RUN data=imagenette data.root=PATH

Logistic regression and nearest neighbours; each goes to `output`/METHOD.safetensors, beside the
run, for `evaluate.py probe=FILE` and other commands. An encoder without classes of its own, such as
DINOv2 or CLIP, needs one wherever classes are asked for.
"""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm.auto import tqdm

import harness
from featinv.analysis.probe import METHODS, fit_probe, pooled_features
from featinv.checkpoints import load_model
from featinv.cli.app import command, run_entry_point
from featinv.utils.devices import pick_device
from featinv.utils.errors import at_least


def main(config: DictConfig) -> None:
    """Fit, measure on held-out images, save, write a table."""
    number = at_least("num_train_images", config.num_train_images, 2)
    options = {"logistic": {"inverse_strength": config.inverse_strength}}
    backbone = load_model(config.checkpoint).backbone.to(pick_device(config.device))
    if config.layer is not None:
        backbone.use_layer(config.layer)
    size = config.data.image_size or backbone.image_size
    data = instantiate(config.data, image_size=size, max_images=config.num_images)
    num_batches = -(-number // data.batch_size)
    stream = islice(data.train_dataloader(), num_batches)  # it is endless
    bar = {"unit": "batch", "desc": "features"}
    features, labels = pooled_features(backbone, tqdm(stream, total=num_batches, **bar))
    held_out = pooled_features(backbone, tqdm(data.test_dataloader(), **bar))
    output = Path(config.output)
    rows, accuracies = [], {}
    for method in METHODS:
        probe = fit_probe(
            features[:number],
            labels[:number],
            method,
            config.num_classes,
            backbone,
            **options.get(method, {}),
        )
        probe = replace(probe, accuracy=probe.measure(*held_out))
        probe.save(output / f"{method}.safetensors")
        accuracies[method] = probe.accuracy
        rows.append({"probe": method, "accuracy": f"{probe.accuracy:.3f}"})
    about = (
        f"Features of {probe.encoder}, layer {probe.layer}; fitted to {len(labels[:number])} "
        f"images of {len(probe.classes)} classes, measured on {len(held_out[1])} others."
    )
    numbers = {"accuracy": accuracies, "encoder": probe.encoder, "layer": probe.layer}
    numbers["command"] = command()
    (output / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "probe")
