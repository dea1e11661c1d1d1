"""`evaluate`: score a trained model on a data set, or invert your own photographs."""

import logging

from omegaconf import DictConfig

from featinv.cli.app import (
    command,
    log_table,
    make_batches,
    make_evaluation,
    open_model,
    run_entry_point,
)
from featinv.evaluation.tables import markdown_table
from featinv.models import Inverter
from featinv.utils.errors import InputError

log = logging.getLogger("evaluate")


def check_backbone(model: Inverter, expected: DictConfig) -> None:
    """Raise an `InputError` if the checkpoint's backbone is not the expected one."""
    backbone = model.backbone
    found = {"name": backbone.name, "layer": backbone.layer, "image_size": backbone.image_size}
    if backbone.layer == backbone.layer_names[-1] and expected.layer == "last":
        found["layer"] = "last"
    for key, value in found.items():
        if expected[key] not in (None, value):
            raise InputError(
                f"backbone.{key} is {expected[key]}, but the checkpoint was trained with {value}: "
                f"expected backbone.name={backbone.name} backbone.layer={backbone.layer} "
                f"backbone.image_size={backbone.image_size}, or no backbone at all."
            )


def main(config: DictConfig) -> None:
    """Load and evaluate a model; save the table, the numbers and the picture."""
    model = open_model(config.checkpoint, config)
    check_backbone(model, config.backbone)
    evaluation = make_evaluation(config, model)
    try:
        evaluation.run(make_batches(config, model))
    finally:  # save what was computed, even if the data turn out to be broken
        if evaluation.keys:
            data = dict(config.data) if config.images is None else config.images
            about = {"checkpoint": str(config.checkpoint), "data": data}
            evaluation.save(config.output, command(), **about)
            log.info("Table, numbers and picture are in %s", config.output)
    rows = evaluation.table_rows()
    print(f"\n{markdown_table(rows)}\n{evaluation.caption()}")
    log_table(rows, config)


def run() -> None:
    """Run the command line."""
    run_entry_point(main, "evaluate")


if __name__ == "__main__":
    run()
