"""`evaluate`: score a trained model on a data set, or invert your own photographs."""

from omegaconf import DictConfig

from featinv.cli.app import (
    log_table,
    make_batches,
    make_evaluation,
    open_model,
    run_entry_point,
    run_evaluation,
)
from featinv.models import Inverter
from featinv.utils.errors import InputError


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
    data = dict(config.data) if config.images is None else config.images
    about = {"checkpoint": str(config.checkpoint), "data": data}
    rows = run_evaluation(evaluation, make_batches(config, model), config.output, **about)
    log_table(rows, config)


def run() -> None:
    """Run the command line."""
    run_entry_point(main, "evaluate")


if __name__ == "__main__":
    run()
