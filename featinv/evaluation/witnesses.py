"""Witnesses: classifiers that took no part in training or guidance, and say what is drawn."""

import logging
from collections.abc import Sequence

from featinv.backbones import Backbone
from featinv.evaluation.set_metrics import INCEPTION, extractor_backbone
from featinv.utils.errors import InputError

log = logging.getLogger(__name__)


def load_witnesses(names: Sequence[str], inverted: Backbone) -> dict[str, Backbone]:
    """Return name -> classifier at its last layer.

    Args:
        names: `"lite2"`, `"lite1"`, `"lite0"`, or timm names with weights from the hub.
        inverted: The backbone that the model inverts, which is no witness: it is left out.

    Raises:
        InputError: Unknown name, weights that cannot be had, or a network without classes.
    """
    witnesses = {}
    for name in names:
        if name == INCEPTION:
            raise InputError(
                "'inception' gives no spatial features, so it is no witness: expected for example "
                "witnesses=[lite2] extractors=[inception]."
            )
        witness = extractor_backbone(name, "witness")
        if witness.name.split(".")[0] == inverted.name.split(".")[0]:
            log.warning("%s is the backbone that is inverted, no witness: it is left out", name)
            continue
        if not witness.classifies:
            raise InputError(
                f"The witness '{name}' has no classes to agree about: expected a classifier, for "
                "example lite2."
            )
        witnesses[name] = witness
    return witnesses


def check_label_space(witness: Backbone, labels_of: Backbone) -> None:
    """Raise an `InputError` if a witness' classes cannot be those of another classifier.

    Args:
        witness: Whose classes are to be compared.
        labels_of: The classifier that the other classes come from.
    """
    own, other = witness.num_classes, labels_of.num_classes
    if own != other:
        raise InputError(
            f"The witness '{witness.name}' tells {own} classes and '{labels_of.name}' {other}, so "
            f"their answers do not compare: expected a witness of {other} classes."
        )
