"""Witnesses: classifiers for evaluation that took no part in training or guidance."""

import logging
from collections.abc import Sequence

from featinv.backbones import Backbone
from featinv.evaluation.set_metrics import INCEPTION, extractor_backbone
from featinv.models.base import Inverter
from featinv.utils.errors import InputError

log = logging.getLogger(__name__)


def load_witnesses(names: Sequence[str], model: Inverter) -> dict[str, Backbone]:
    """Return name -> classifier at its last layer.

    Args:
        names: `"lite2"`, `"lite1"`, `"lite0"`, or timm names with weights from the hub.
        model: The model to evaluate. Classifiers that it was trained with or inverts are left out,
            with a warning.

    Raises:
        InputError: Unknown name, unavailable weights, or a network without classes.
    """
    witnesses = {}
    took_part = _took_part(model)
    for name in names:
        if name == INCEPTION:
            raise InputError(
                "'inception' has no spatial features, so it cannot be a witness: expected for "
                "example witnesses=[lite2] extractors=[inception]."
            )
        witness = extractor_backbone(name, "witness")
        if part := took_part.get(_architecture(witness.name)):
            log.warning("%s is not used as a witness: it is %s", name, part)
            continue
        if not witness.classifies:
            raise InputError(
                f"The witness '{name}' has no classes: expected a classifier, for example lite2."
            )
        witnesses[name] = witness
    return witnesses


def _took_part(model: Inverter) -> dict[str, str]:
    """Return architecture -> its part in the model's training or guidance."""
    in_prior = getattr(getattr(model, "unet", None), "perceptual_networks", ())
    part = "part of the perceptual loss that the prior was trained with"
    found = {_architecture(name): part for name in in_prior}
    if network := getattr(getattr(model, "perceptual", None), "network", None):
        part = "part of the perceptual loss that the model was trained with"
        found[_architecture(network.name)] = part
    return found | {_architecture(model.backbone.name): "the backbone that is inverted"}


def _architecture(name: str) -> str:
    return name.split(".")[0]


def check_label_space(witness: Backbone, labels_of: Backbone) -> None:
    """Raise an `InputError` unless a witness has as many classes as the classifier `labels_of`."""
    own, other = witness.num_classes, labels_of.num_classes
    if own != other:
        raise InputError(
            f"The witness '{witness.name}' has {own} classes and '{labels_of.name}' {other}, so "
            f"their predictions do not compare: expected a witness with {other} classes."
        )
