"""What experiments share: to find models, to score each once, to draw, to write a table down."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import default_collate

from featinv.checkpoints import MODEL_FILE, SHIPPED, find_checkpoint, load_model
from featinv.cli.app import command, log_table, make_batches, make_evaluation, sampler_options
from featinv.evaluation.set_metrics import distance_name
from featinv.evaluation.tables import format_interval, save_tables
from featinv.metrics import spatial_cosine
from featinv.models.base import Inverter
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, unknown
from featinv.utils.pixels import eight_bit, from_uint8, to_uint8

log = logging.getLogger("scoring")

RULE = "the first image of each class, in the order of the data set"  # of `pick`


def publish(rows: Sequence[Mapping[str, str]], about: str, config: DictConfig) -> None:
    """Write an experiment's table down, print it, and log it where the config says.

    Args:
        rows: As for `featinv.evaluation.report.markdown_table`.
        about: What the numbers are.
        config: `output`, where table.md, table.tex and table.csv go, and `wandb`.
    """
    text = save_tables(rows, f"{about}\n\nMade by `{command()}`.", config.output)
    print(f"\n{text}")
    log_table(rows, config)
    log.info("Everything is in %s", config.output)


def is_model(file: Path) -> bool:
    """Return whether a `.safetensors` file is one of this project's models."""
    try:
        with safe_open(file, framework="pt") as opened:
            return "config" in (opened.metadata() or {})
    except SafetensorError:  # damaged: to be told by whoever loads it
        return True


def find_models(paths: str | Sequence[str]) -> dict[str, str]:
    """Return name -> checkpoint of the models that are, or lie in, the given paths.

    What lies there beside them, such as the classifiers of experiments/train_backbone.py, is not.

    Raises:
        InputError: There is none in one of them, or two have the same name.
    """
    several = isinstance(paths, Sequence) and not isinstance(paths, str)
    models: dict[str, str] = {}
    for path in map(str, paths if several else [paths]):
        files = sorted(Path(path).rglob(MODEL_FILE))
        folders = [file.parent for file in files if is_model(file)]
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
                    "expected names that differ."
                )
    return models


def find_methods(config: DictConfig) -> dict[str, tuple[str, dict]]:
    """Return column -> checkpoint, and the sampler's values of its own.

    A method whose checkpoint is null is left out.

    Raises:
        InputError: There is none, or one that is not told as it should be.
    """
    if config.checkpoints is None and config.methods is None:
        raise InputError("There is nothing to show: expected checkpoints=[RUN], or methods.")
    found = {name: (path, {}) for name, path in find_models(config.checkpoints or []).items()}
    methods = {} if config.methods is None else config.methods
    example = "{plain: {checkpoint: RUN, sampler: {num_steps: 50}}}"
    if not isinstance(methods, dict | DictConfig):
        raise InputError(f"methods is '{methods}', expected for example {example}.")
    for name, method in methods.items():
        if not isinstance(method, DictConfig) or "checkpoint" not in method:
            raise InputError(f"The method '{name}' has no checkpoint: expected methods={example}.")
        if method.checkpoint is None:  # e.g. that of a prior, where there is none
            continue
        values = dict(method.get("sampler") or {})
        keys = [(key, ("checkpoint", "sampler")) for key in method]
        for key, known in keys + [(key, list(config.sampler)) for key in values]:
            if key not in known:
                raise unknown(f"value of the method '{name}'", key, known)
        if name in found:
            raise InputError(f"Two columns are called '{name}': expected names that differ.")
        found[name] = (method.checkpoint, values)
    return found


def score(name: str, checkpoint: str, config: DictConfig, folder: Path) -> dict | None:
    """Return the metrics of a model, computed now or before; None for what is no inverter.

    Raises:
        InputError: The folder has the metrics of other weights, data or settings.
    """
    path = folder / "metrics.json"
    asked = _asked(checkpoint, config)
    if not path.is_file():
        model = load_model(checkpoint).to(pick_device(config.device))
        if not model.reconstructs(model.settings(**sampler_options(config))):
            log.info("%s is a prior: experiments/prior.py extractors it", name)
            return None
        evaluation = make_evaluation(config, model)
        evaluation.run(make_batches(config, model), config.num_images)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"backbone": model.backbone.name, "layer": model.backbone.layer}
        about |= {"conditioning": model.conditioning, "asked": asked}
        evaluation.save(folder, command(), checkpoint=checkpoint, **about)
    metrics = json.loads(path.read_text())
    kept = metrics.get("asked", {})
    for key, value in asked.items():
        if kept.get(key) != value:
            raise InputError(
                f"'{path}' was made with {key}={kept.get(key)}, not {value}: expected another "
                "output, or the same settings."
            )
    return metrics


def _asked(checkpoint: str, config: DictConfig) -> dict[str, object]:
    """Return all that a model's scores depend on, to tell whether kept ones are those."""
    data = OmegaConf.to_container(config.data, resolve=False) if config.images is None else None
    values = {key: config[key] for key in ("num_images", "num_samples", "seed", "precision")}
    return values | {
        "extractors": list(config.extractors),
        "lpips": config.lpips,
        "sampler": sampler_options(config),
        "images": config.images,
        "data": data,
        "weights": hashlib.sha256(find_checkpoint(checkpoint).read_bytes()).hexdigest()[:16],
    }


def headline(metrics: dict) -> dict[str, str]:
    """Return the cells that tell most of a model: cosine, agreement, and distances of the sets.

    Args:
        metrics: Contents of metrics.json, as `score` returns them.
    """
    scores = metrics["rows"]["reconstruction"]
    cells = {
        "spatial cosine": format_interval(**scores["spatial_cosine"]),
        "top-1 agreement": format_interval(**scores["top1_agreement"]),
    }
    for extractor, sets in metrics["sets"].items():
        for kind, digits in (("fd", 1), ("kid", 2)):
            if kind in sets["reconstruction"]:
                distance = sets["reconstruction"][kind]
                cells[distance_name(kind, extractor)] = f"{distance:.{digits}f}"
    return cells


def check_one_layer(results: Mapping[str, dict]) -> None:
    """Refuse to compare the cosines of several backbones or layers.

    Args:
        results: Name -> contents of metrics.json, as `score` returns them.

    Raises:
        InputError: They are of several.
    """
    layers = {name: f"{m['backbone']} {m['layer']}" for name, m in results.items()}
    if len(set(layers.values())) > 1:
        raise InputError(
            f"Several layers are inverted ({layers}), whose cosines do not compare: expected one, "
            "with a prior, if there is one, of the same backbone (or prior=null)."
        )


def pick(batches: Iterable[dict], number: int) -> dict:
    """Return a batch of the images that a figure shows, by `RULE` and never by hand.

    Images without a label count as a class each.

    Args:
        batches: Of a data module.
        number: Of how many classes at most.
    """
    items: list[dict] = []
    classes = set()
    for batch in batches:
        for i, label in enumerate(batch["label"].tolist()):
            if label in classes:
                continue
            items.append({name: values[i] for name, values in batch.items()})
            if len(items) == number:
                return default_collate(items)
            if label >= 0:
                classes.add(label)
    return default_collate(items)


def draw(model: Inverter, asked: Tensor, indices: Tensor, config: DictConfig) -> Tensor:
    """Draw as the config says, and take the images through 8 bits, as all that is scored.

    Args:
        model: Draws.
        asked: Features, shape (B, C, h, w).
        indices: The images' own numbers, shape (B,).
        config: `num_samples`, `seed`, `batch_size`, `precision`, `sampler`.

    Returns:
        Shape (B, num_samples, 3, H, W), in [-1, 1].
    """
    drawn = model.invert(
        asked,
        config.num_samples,
        seed=config.seed,
        indices=indices.tolist(),
        batch_size=config.batch_size,
        precision=config.precision,
        **sampler_options(config),
    )
    return eight_bit(drawn)


@torch.no_grad()
def reconstruct(
    name: str, model: Inverter, batch: dict, config: DictConfig
) -> tuple[Tensor, Tensor]:
    """Draw one reconstruction of each image: the first of those that an evaluation scores.

    Args:
        name: What the model is called, if it has to be refused.
        model: Whose own features are inverted and compared.
        batch: Of a data module.
        config: As for `draw`, but for the number of samples.

    Returns:
        Reconstructions, uint8, (B, 3, H, W), and their spatial cosines, (B,).

    Raises:
        InputError: What the model draws does not depend on the features.
    """
    options = sampler_options(config)
    if not model.reconstructs(model.settings(**options)):
        raise InputError(f"'{name}' is a prior, which does not reconstruct: expected another.")
    features = model.backbone.features(from_uint8(batch["image"].to(model.device)))
    one = OmegaConf.merge(config, {"num_samples": 1})
    drawn = draw(model, features, batch["index"], one)[:, 0]
    seen = model.backbone.features(drawn)
    return to_uint8(drawn).cpu(), spatial_cosine(features, seen).cpu()
