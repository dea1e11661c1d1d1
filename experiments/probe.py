"""Fit probes to an encoder's pooled features: which classes do they tell apart?

python experiments/probe.py checkpoint=RUN data=imagenette data.root=PATH

A logistic regression and a nearest-neighbour classifier go to `output`/METHOD.safetensors, for
`evaluate.py probe=FILE` and other commands. Encoders without classes of their own,
such as DINOv2 or CLIP, need a probe wherever predictions are used.
"""

from dataclasses import replace
from itertools import islice

from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm.auto import tqdm

import harness
from featinv.analysis.probe import METHODS, fit_probe, pooled_features
from featinv.checkpoints import load_model
from featinv.cli.app import run_entry_point
from featinv.utils.devices import pick_device
from featinv.utils.errors import at_least


def main(config: DictConfig) -> None:
    """Fit, measure on held-out images, save, write a table."""
    number = at_least("num_train_images", config.num_train_images, 2)
    backbone = load_model(config.checkpoint).backbone.to(pick_device(config.device))
    if config.layer is not None:
        backbone.use_layer(config.layer)
    size = config.data.image_size or backbone.image_size
    data = instantiate(config.data, image_size=size, max_images=config.num_images)
    num_batches = -(-number // data.batch_size)
    stream = islice(data.train_dataloader(), num_batches)  # it is endless
    bar = {"unit": "batch", "desc": "features"}
    features, labels = pooled_features(backbone, tqdm(stream, total=num_batches, **bar))
    features, labels = features[:number], labels[:number]
    held_out = pooled_features(backbone, tqdm(data.test_dataloader(), **bar))
    accuracies = {}
    for method in METHODS:
        how = (method, config.num_classes, backbone, config.inverse_strength)
        probe = fit_probe(features, labels, *how)
        probe = replace(probe, accuracy=probe.measure(*held_out))
        probe.save(f"{config.output}/{method}.safetensors")
        accuracies[method] = probe.accuracy
    rows = [{"probe": name, "accuracy": f"{value:.3f}"} for name, value in accuracies.items()]
    about = (
        f"Features of {probe.encoder}, layer {probe.layer}; fitted to {len(labels)} images of "
        f"{len(probe.classes)} classes, measured on {len(held_out[1])} others."
    )
    metrics = {"accuracy": accuracies, "encoder": probe.encoder, "layer": probe.layer}
    harness.publish(rows, about, config, metrics=metrics)


if __name__ == "__main__":
    run_entry_point(main, "probe")
