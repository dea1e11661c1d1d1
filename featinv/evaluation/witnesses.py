"""Witnesses: independent classifiers, which took no part in training or guidance."""

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
    for name in names:
        witness, reason = _load(name, model)
        if reason:
            log.warning("%s is not used as a witness: it is %s", name, reason)
        else:
            witnesses[name] = witness
    return witnesses


def load_witness(name: str, model: Inverter) -> Backbone:
    """Return one witness, on the model's device; arguments as for `load_witnesses`.

    Raises:
        InputError: As `load_witnesses`, or the classifier is not independent of the model.
    """
    witness, reason = _load(name, model)
    if reason:
        raise InputError(
            f"'{name}' cannot be the witness, since it is {reason}: expected another classifier, "
            "for example witness=lite2."
        )
    return witness.to(model.device)


def _load(name: str, model: Inverter) -> tuple[Backbone, str | None]:
    """Return a classifier, and why it is no witness, if so."""
    if name == INCEPTION:
        raise InputError(
            "'inception' has no spatial features, so it cannot be a witness: expected for "
            "example witnesses=[lite2] extractors=[inception]."
        )
    witness = extractor_backbone(name, "witness")
    reason = _excluded(model).get(_architecture(witness.name))
    if not reason and not witness.classifies:
        raise InputError(
            f"The witness '{name}' has no classes: expected a classifier, for example lite2."
        )
    return witness, reason


def _excluded(model: Inverter) -> dict[str, str]:
    """Return architecture -> why it is no witness: its part in training or guidance."""
    in_prior = getattr(getattr(model, "unet", None), "perceptual_networks", ())
    part = "part of the perceptual loss that the prior was trained with"
    found = {_architecture(name): part for name in in_prior}
    if network := getattr(getattr(model, "perceptual", None), "network", None):
        part = "part of the perceptual loss that the model was trained with"
        found[_architecture(network.name)] = part
    return found | {_architecture(model.backbone.name): "the backbone that is inverted"}


def _architecture(name: str) -> str:
    return name.split(".")[0]
