"""The models and samplers that an experiment compares, from its config."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open

from featinv.checkpoints import MODEL_FILE, SHIPPED, find_checkpoint, load_model
from featinv.cli.app import open_model, sampler_options
from featinv.models.base import Inverter
from featinv.utils.errors import InputError, unknown
from featinv.utils.files import sha256


class NotInverting(InputError):
    """A prior without feature guidance, whose samples do not depend on the features."""


@dataclass(frozen=True)
class Setting:
    """A row of a grid: a model, and how it draws.

    Args:
        name: Of the row.
        checkpoint: A run's folder, a checkpoint file, or the name of a shipped model.
        sampler: Values that replace those of the config.
        layer: Layer to invert, instead of the config's.
    """

    name: str
    checkpoint: str
    sampler: dict = field(default_factory=dict)
    layer: str | None = None

    def apply(self, config: DictConfig) -> DictConfig:
        """Return the config with the setting's own values; it must know their keys."""
        layer = {} if self.layer is None else {"layer": self.layer}
        values = {key: value for key, value in self.sampler.items() if key != "_target_"}
        return OmegaConf.merge(config, {"sampler": values}, layer)


# Find


def as_list(value: object) -> list[str]:
    """Return the values of an option that takes one (`runs=a`) or several (`runs=[a,b]`)."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return [str(part) for part in (value if several else [value])]


def find_models(paths: str | Sequence[str]) -> dict[str, str]:
    """Return name -> checkpoint of the models at, or anywhere below, the given paths.

    Other weights there, such as those of experiments/train_backbone.py, are skipped.

    Raises:
        InputError: A path has none, or two have the same name.
    """
    models: dict[str, str] = {}
    for path in as_list(paths):
        folders = [file.parent for file in sorted(Path(path).rglob(MODEL_FILE)) if is_model(file)]
        found = [path] if path in SHIPPED or Path(path).is_file() else list(map(str, folders))
        if not found:
            raise InputError(
                f"There is no model in '{path}': expected a run's folder, a folder with runs in "
                f"it, a checkpoint file, or {' or '.join(SHIPPED)}."
            )
        for checkpoint in found:
            name = Path(checkpoint).stem if Path(checkpoint).is_file() else Path(checkpoint).name
            if models.setdefault(name, checkpoint) != checkpoint:
                raise InputError(
                    f"Two models are called '{name}': '{models[name]}' and '{checkpoint}'; "
                    "expected different names."
                )
    return models


def is_model(file: Path) -> bool:
    """Return whether a `.safetensors` file holds a model of this project."""
    try:
        with safe_open(file, framework="pt") as opened:
            return "config" in (opened.metadata() or {})
    except SafetensorError:  # corrupt, which loading will report
        return True


def find_settings(config: DictConfig) -> list[Setting]:
    """Return the settings of `checkpoints`, drawn from as they are, and of `methods`.

    A method whose checkpoint is null is left out, as with `prior=null`.

    Raises:
        InputError: There are none, a method is malformed, or two settings have the same name.
    """
    methods = config.get("methods")
    if config.checkpoints is None and methods is None:
        raise InputError("There is nothing to draw from: expected checkpoints=[RUN], or methods.")
    settings = [Setting(name, path) for name, path in find_models(config.checkpoints or []).items()]
    methods = {} if methods is None else methods
    example = "{plain: {checkpoint: RUN, sampler: {num_steps: 50}}}"
    if not isinstance(methods, dict | DictConfig):
        raise InputError(f"methods is '{methods}', expected for example {example}.")
    for name, method in methods.items():
        if not isinstance(method, DictConfig) or "checkpoint" not in method:
            raise InputError(f"The method '{name}' has no checkpoint: expected methods={example}.")
        for key in method:
            if key not in ("checkpoint", "sampler"):
                raise unknown(f"key of the method '{name}'", key, ("checkpoint", "sampler"))
        if name in {setting.name for setting in settings}:
            raise InputError(f"Two models are called '{name}': expected different names.")
        if method.checkpoint is not None:
            sampler = dict(method.get("sampler") or {})
            settings.append(Setting(str(name), method.checkpoint, sampler))
    for setting in settings:
        setting.apply(config)  # raises for an unknown value of the sampler, before any drawing
    return settings


def each_layer(settings: Sequence[Setting], only: str | None = None) -> list[Setting]:
    """Return a setting for each layer of each model, or for one layer of each.

    It is named by model and layer, or by the layer if there is one model only.
    """
    found = []
    for setting in settings:
        layers = load_model(setting.checkpoint).backbone.layers if only is None else (only,)
        for layer in layers:
            name = setting.name
            if len(layers) > 1:
                name = layer if len(settings) == 1 else f"{name}_{layer}"
            found.append(replace(setting, name=name, layer=layer))
    return found


# Open


def open_setting(setting: Setting, config: DictConfig) -> tuple[Inverter, DictConfig, str]:
    """Return the model of a setting, its config, and how it draws in words.

    Raises:
        NotInverting: What it draws does not depend on the features.
    """
    config = setting.apply(config)
    model = open_model(setting.checkpoint, config)
    sampler = model.settings(**sampler_options(config))
    if not model.reconstructs(sampler):
        raise NotInverting(
            f"'{setting.name}' is a prior without feature guidance, which inverts no features: "
            "expected another model, or guidance."
        )
    return model, config, sampler.describe()


def open_checkpoint(config: DictConfig) -> tuple[Inverter, str]:
    """Return the model of `checkpoint`, and how it draws in words; see `open_setting`."""
    model, _, sampling = open_setting(Setting("checkpoint", config.checkpoint), config)
    return model, sampling


# Results on disk


def dependencies(config: DictConfig, checkpoint: str | None, *names: str) -> dict[str, object]:
    """Return all that a result depends on: weights, images, sampler, and further keys (`names`).

    `checkpoint` is `None` for a model without weights.
    """
    shared = ["images", "num_images", "seed", "precision", "layer", "probe"]
    shared += ["data"] if config.images is None else []
    shared += ["num_samples"] if "num_samples" in config else []
    values = OmegaConf.to_container(OmegaConf.masked_copy(config, [*shared, *names]))
    weights = None if checkpoint is None else file_hash(find_checkpoint(checkpoint))
    return values | {"sampler": sampler_options(config), "weights": weights}


def file_hash(path: str | Path) -> str:
    """Return the first 16 digits of a file's SHA-256."""
    return sha256(path)[:16]
