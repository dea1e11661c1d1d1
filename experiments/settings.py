"""The models and samplers that an experiment compares, from its config."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open

from featinv.analysis.probe import Probe
from featinv.checkpoints import MODEL_FILE, SHIPPED, find_checkpoint, load_model
from featinv.cli.app import sampler_options
from featinv.models.base import Inverter
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, unknown
from featinv.utils.files import sha256


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
        """Return the config with the setting's own values."""
        layer = {} if self.layer is None else {"layer": self.layer}
        values = {key: value for key, value in self.sampler.items() if key != "_target_"}
        return OmegaConf.merge(config, {"sampler": values}, layer)


# Find


def find_models(paths: str | Sequence[str]) -> dict[str, str]:
    """Return name -> checkpoint of the models at, or anywhere below, the given paths.

    Other weights there, such as those of experiments/train_backbone.py, are skipped.

    Raises:
        InputError: A path has none, or two have the same name.
    """
    several = isinstance(paths, Sequence) and not isinstance(paths, str)
    models: dict[str, str] = {}
    for path in map(str, paths if several else [paths]):
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

    A method whose checkpoint is null is left out.

    Raises:
        InputError: There are none, or a method is malformed.
    """
    methods = config.get("methods")
    if config.checkpoints is None and methods is None:
        raise InputError("There is nothing to draw from: expected checkpoints=[RUN], or methods.")
    found = [Setting(name, path) for name, path in find_models(config.checkpoints or []).items()]
    methods = {} if methods is None else methods
    example = "{plain: {checkpoint: RUN, sampler: {num_steps: 50}}}"
    if not isinstance(methods, dict | DictConfig):
        raise InputError(f"methods is '{methods}', expected for example {example}.")
    for name, method in methods.items():
        if not isinstance(method, DictConfig) or "checkpoint" not in method:
            raise InputError(f"The method '{name}' has no checkpoint: expected methods={example}.")
        if method.checkpoint is None:  # as with prior=null
            continue
        values = dict(method.get("sampler") or {})
        keys = [(key, ("checkpoint", "sampler")) for key in method]
        for key, known in keys + [(key, ["_target_", *config.sampler]) for key in values]:
            if key not in known:
                raise unknown(f"value of the method '{name}'", key, known)
        if name in {setting.name for setting in found}:
            raise InputError(f"Two models are called '{name}': expected different names.")
        found.append(Setting(str(name), method.checkpoint, values))
    return found


def each_layer(settings: Sequence[Setting], only: str | None = None) -> list[Setting]:
    """Return a setting for each layer of each model.

    It is named by model and layer, or by the layer if there is one model only.

    Args:
        settings: Of the models.
        only: Take this layer of each.
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


def open_model(checkpoint: str, config: DictConfig) -> Inverter:
    """Return a model in eval mode on the config's device, set to the config's layer and probe."""
    model = load_model(checkpoint).to(pick_device(config.device))
    if (layer := config.get("layer")) is not None:
        model.backbone.use_layer(layer)
    if config.probe is not None:
        Probe.load(config.probe).attach(model.backbone)
    return model


def open_setting(setting: Setting, config: DictConfig) -> tuple[Inverter, DictConfig, str]:
    """Return the model of a setting, its config, and how it draws in words.

    Raises:
        InputError: It does not invert features.
    """
    config = setting.apply(config)
    model = open_model(setting.checkpoint, config)
    if not reconstructs(model, config):
        raise not_inverting(setting.name)
    return model, config, describe_sampling(model, config)


def open_checkpoint(config: DictConfig) -> tuple[Inverter, str]:
    """Return the model of `checkpoint`, and how it draws in words; see `open_setting`."""
    model, _, sampling = open_setting(Setting("checkpoint", config.checkpoint), config)
    return model, sampling


def reconstructs(model: Inverter, config: DictConfig) -> bool:
    """Return whether what a model draws with the config's sampler depends on the features."""
    return model.reconstructs(model.settings(**sampler_options(config)))


def not_inverting(name: str) -> InputError:
    """Return the error for a setting that does not invert features."""
    return InputError(
        f"'{name}' is a prior without feature guidance, which inverts no features: expected "
        "another model, or guidance."
    )


def describe_sampling(model: Inverter, config: DictConfig) -> str:
    """Return in words how a model draws with the config's sampler."""
    return model.settings(**sampler_options(config)).describe()


# Results on disk


def dependencies(config: DictConfig, checkpoint: str | None, *names: str) -> dict[str, object]:
    """Return all that a result depends on: weights, images, sampler, and further values.

    Args:
        config: The experiment's.
        checkpoint: Of the model; `None` if it has no weights.
        names: Further keys of the config.
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
