"""Checkpoints: build a model from its config, save it, load it, and take over a prior."""

import copy
import io
import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.plugins import TorchCheckpointIO
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from featinv.data.base import what_is_there
from featinv.errors import InputError, cause_of
from featinv.module import FeatInv
from featinv.original import import_original as import_original  # offered here too

MODEL_FILE = "model.safetensors"  # averaged weights: what `FeatInv.load` reads
LAST_FILE = Path("checkpoints") / "last.ckpt"  # the whole training state: what `resume` reads

# A config names the classes to build. Only these may be named, so that loading a checkpoint
# from somebody else cannot run anything but this.
MODEL = "featinv.module.FeatInv"
TARGETS = frozenset(
    {
        MODEL,
        "diffusers.UNet2DConditionModel",
        "featinv.backbones.Backbone",
        "featinv.checkpoints.load_prior",
        "featinv.codecs.PatchPCA",
        "featinv.diffusion.Diffusion",
        "featinv.sampling.Sampler",
        "torch.optim.Adam",
        "torch.optim.AdamW",
        "torch.optim.SGD",
    }
)


def build_model(config: dict) -> FeatInv:
    """Build an untrained model from its config.

    Args:
        config: Nested `_target_` nodes of Hydra with all values resolved, as in `configs/model`.

    Raises:
        InputError: Not the config of a model, a `_target_` that is not among `TARGETS`, or a value
            that a class refuses.
    """
    if config.get("_target_") != MODEL:
        raise InputError(
            f"The config builds '{config.get('_target_', 'nothing')}', expected '{MODEL}'."
        )
    _check_targets(config)
    try:
        model = instantiate(OmegaConf.create(config), _convert_="all")
    except HydraException as error:
        raise cause_of(error) from None
    model.config = copy.deepcopy(config)
    return model


def save_model(model: FeatInv, path: str | Path) -> None:
    """Write the trained weights, the config and the hashes of what is frozen to one file.

    Args:
        model: A trained model.
        path: The `.safetensors` file; it appears at once and whole, or not at all.
    """
    state = {
        key: value.detach().contiguous() for key, value in model.trained().state_dict().items()
    }
    metadata = {"config": json.dumps(model.config), "frozen": json.dumps(model.frozen_hashes())}
    write_whole(path, save(state, metadata))


def write_whole(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file that appears at once and whole; until then, what was there before stays.

    Raises:
        InputError: The disk is full, or refuses the file for another reason.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file with the new name
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise InputError(
            f"Cannot write '{path}' ({error.strerror}): expected access, and room for "
            f"{len(content) / 1e6:.1f} MB; what was saved there before is as it was."
        ) from error


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, by `write_whole`.

    Lightning's own way writes to the folder for temporary files first; if that is on another disk
    than the checkpoint, it then copies the file over the previous checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        """Write a checkpoint; see Lightning's `CheckpointIO`."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(path, buffer.getbuffer())


def load_model(path: str | Path) -> FeatInv:
    """Load a trained model, in eval mode, on the CPU.

    Args:
        path: A run's folder, a `.safetensors` file written by `save_model`, or a Lightning
            checkpoint of a run (whose averaged weights are taken if there are any).

    Raises:
        InputError: Missing or corrupt file, or frozen weights other than those it was trained with.
    """
    path = find_checkpoint(path)
    config, frozen, state = read_checkpoint(path)
    model = build_model(config)
    model.check_frozen(frozen)
    model.check_trained(state)
    model.load_state_dict(state, strict=False)
    return model.eval()


def load_prior(path: str | Path) -> UNet2DConditionModel:
    """Return the UNet of a trained model, to be frozen or trained on in another.

    Args:
        path: As for `load_model`.

    Raises:
        InputError: As `load_model`; or the model's own UNet was not trained.
    """
    model = load_model(path)
    if not model.train_unet:
        raise InputError(
            f"The checkpoint '{path}' holds no UNet, it was trained on a frozen one: "
            "expected a run with model.train_unet=true, e.g. conditioning=none."
        )
    return model.unet


def find_checkpoint(path: str | Path) -> Path:
    """Return the file that a run's folder or a path stands for.

    Raises:
        InputError: There is none; the sentence names what is there.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        for name in (MODEL_FILE, LAST_FILE):
            if (path / name).is_file():
                return path / name
        runs = sorted({str(found.parent) for found in path.rglob(MODEL_FILE)})[:3]
        hint = f"did you mean {', '.join(runs)}?" if runs else f"expected {MODEL_FILE} in it."
        raise InputError(f"The folder '{path}' is not a finished run: {hint}")
    raise InputError(
        f"There is no checkpoint '{path}': expected a run's folder, a .safetensors or a .ckpt "
        f"file; {what_is_there(path)}."
    )


def read_checkpoint(path: Path) -> tuple[dict, dict[str, str], dict[str, Tensor]]:
    """Return config, hashes of the frozen modules, and trained weights of a checkpoint file.

    Raises:
        InputError: The file cannot be read, or is not one of this project's.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return json.loads(metadata["config"]), json.loads(metadata["frozen"]), state
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        averaged = checkpoint.get("callbacks", {}).get("EMA")
        state = averaged["weights"] if averaged else checkpoint["state_dict"]
        return checkpoint["featinv"]["config"], checkpoint["featinv"]["frozen"], state
    except PermissionError:
        raise
    except (SafetensorError, KeyError, TypeError) as error:
        raise InputError(
            f"The file '{path}' is not a checkpoint of FeatInv or is corrupt "
            f"({type(error).__name__}: {error}); expected a file that train.py wrote."
        ) from error
    except Exception as error:  # torch.load has no error of its own for a damaged file
        raise InputError(
            f"The checkpoint '{path}' cannot be read ({type(error).__name__}: it is truncated or "
            "not a checkpoint); expected a file that train.py wrote."
        ) from error


def _check_targets(node: object) -> None:
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and target not in TARGETS:
            raise InputError(
                f"The model's config names '{target}', which is not one of the classes that a "
                f"model may be built from: {', '.join(sorted(TARGETS))}."
            )
        for value in node.values():
            _check_targets(value)
    elif isinstance(node, list):
        for value in node:
            _check_targets(value)
