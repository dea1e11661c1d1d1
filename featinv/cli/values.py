"""Config values: their types, which are those of their defaults, and their quotes."""

from contextlib import suppress
from dataclasses import make_dataclass
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from featinv.utils.errors import InputError

# Values of several types: a number, a list or "auto"; one layer or several.
ANY_TYPE = ("trainer.devices", "backbone.layer")


def quoted(text: str | Path) -> str:
    """Return a text as Hydra's command line reads it back: in quotes, if it needs them."""
    text = str(text)
    if text and "$" not in text and ":" not in text:
        with suppress(HydraException):
            if OverridesParser.create().parse_override(f"key={text}").value() == text:
                return text
    return QuotedString(text, Quote.single).with_quotes().replace("${", "\\${")


def check_types(config: DictConfig) -> None:
    """Convert the values of the running job's config to the types of their defaults, in place.

    OmegaConf's structured configs do the conversion; 1e5 is a whole number too. A default of null
    takes any value, and any value may be null.

    Raises:
        InputError: A value is missing, or cannot be converted.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise InputError(f"The value of {missing[0]} is missing: set it with {missing[0]}=...")
    job = HydraConfig.get()
    choices = [
        f"{group}={option}"
        for group, option in job.runtime.choices.items()
        if option is not None and not group.startswith("hydra/")
    ]
    _convert(config, compose(job.job.config_name, choices))


def _convert(config: DictConfig, defaults: DictConfig, prefix: str = "") -> None:
    for name in config:
        if OmegaConf.is_interpolation(config, name):  # checked where it points
            continue
        key, value = f"{prefix}{name}", config[name]
        default = OmegaConf.select(defaults, str(name), throw_on_resolution_failure=False)
        if OmegaConf.is_dict(value) and OmegaConf.is_dict(default):
            _convert(value, default, f"{key}.")
        elif value is not None and default is not None and key not in ANY_TYPE:
            converted = _typed(key, value, default)
            if type(converted) is not type(value):
                config[name] = converted


def _typed(key: str, value: object, default: object) -> object:
    """Return a value in the type of its default."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if OmegaConf.is_config(default):
        default = OmegaConf.to_container(default)
    kind = type(default)
    typed = OmegaConf.structured(make_dataclass("Typed", [("value", kind)]))
    try:
        typed.value = value
    except ValidationError as error:
        raise InputError(
            f"{key} is '{value}', expected {kind.__name__}, for example {default}."
        ) from error
    return typed.value
