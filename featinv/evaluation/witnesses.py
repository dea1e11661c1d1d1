"""Witnesses: classifiers that took no part in training or guidance, and say what is drawn."""

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
        model: What it was trained or is guided by is no witness: it is left out, with a warning.

    Raises:
        InputError: Unknown name, unavailable weights, or a network without classes.
    """
    witnesses = {}
    took_part = _took_part(model)
    for name in names:
        if name == INCEPTION:
            raise InputError(
                "'inception' gives no spatial features, so it is no witness: expected for example "
                "witnesses=[lite2] extractors=[inception]."
            )
        witness = extractor_backbone(name, "witness")
        if part := took_part.get(_architecture(witness)):
            log.warning("%s is %s, no witness: it is left out", name, part)
            continue
        if not witness.classifies:
            raise InputError(
                f"The witness '{name}' has no classes to agree about: expected a classifier, for "
                "example lite2."
            )
        witnesses[name] = witness
    return witnesses


def _took_part(model: Inverter) -> dict[str, str]:
    """Return the architectures that a model has seen, and what they are to it."""
    found = {}
    if network := getattr(getattr(model, "perceptual", None), "network", None):
        found[_architecture(network)] = "in the perceptual loss that the model was trained with"
    return found | {_architecture(model.backbone): "the backbone that is inverted"}


def _architecture(backbone: Backbone) -> str:
    return backbone.name.split(".")[0]


def check_label_space(witness: Backbone, labels_of: Backbone) -> None:
    """Raise an `InputError` if a witness' classes cannot be those of another classifier.

    Args:
        witness: Whose classes are to be compared.
        labels_of: The classifier that the other classes come from.
    """
    own, other = witness.num_classes, labels_of.num_classes
    if own != other:
        raise InputError(
            f"The witness '{witness.name}' has {own} classes and '{labels_of.name}' {other}, so "
            f"their answers do not compare: expected a witness of {other} classes."
        )
