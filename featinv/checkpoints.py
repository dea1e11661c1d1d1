"""Checkpoints: save a model, rebuild it from its config, load the UNet of another.

A model file is a safetensors file of the trained weights. Its metadata hold the config that builds
the model, and hashes of the frozen parts.
"""

import json
import os
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from featinv.utils.downloads import PREFIX, fetch
from featinv.utils.errors import InputError
from featinv.utils.files import describe_folder
from featinv.utils.paths import find_near, map_paths, relocate
from featinv.utils.tensor_files import save_tensors

MODEL_FILE = "model.safetensors"  # averaged weights: what `FeatInv.load` reads
LAST_FILE = Path("checkpoints") / "last.ckpt"  # the whole training state: what `resume` reads
ASSETS = Path(__file__).parent / "assets"
SHIPPED = {  # models that come with the package, by name
    "imagenette-small": ASSETS / "imagenette-small" / MODEL_FILE,
    "imagenette-small-prior": ASSETS / "imagenette-small" / "prior.safetensors",
}
NAMES = {*SHIPPED, "timm", "pypi", "random"}  # names of weights in a config, not paths
FOLDER = "{folder}"  # placeholder in a config for the checkpoint's folder

# What a config may build: loading someone else's checkpoint cannot run anything else.
MODELS = (
    "featinv.models.Decoder",
    "featinv.models.FeatInv",
    "featinv.models.PixelOptimization",
)
TARGETS = frozenset(
    {
        *MODELS,
        "diffusers.AutoencoderKL",
        "diffusers.UNet2DConditionModel",
        "featinv.analysis.planted.load_planted",
        "featinv.backbones.Backbone",
        "featinv.checkpoints.load_prior",
        "featinv.codecs.PatchPCA",
        "featinv.codecs.StableDiffusionVAE",
        "featinv.diffusion.Diffusion",
        "featinv.interop.official.AbsentBackbone",
        "featinv.interop.stable_diffusion.Prompts",
        "featinv.interop.stable_diffusion.load_prompts",
        "featinv.interop.stable_diffusion.load_unet",
        "featinv.interop.stable_diffusion.load_vae",
        "featinv.losses.PerceptualLoss",
        "featinv.sampling.SamplerConfig",
        "featinv.transforms.PixelNoise",
        "featinv.transforms.ShiftAndZoom",
        "torch.optim.Adam",
        "torch.optim.AdamW",
        "torch.optim.SGD",
    }
)
# Names in configs of earlier versions, and their new ones.
ALIASES = {
    "featinv.decoder.Decoder": "featinv.models.Decoder",
    "featinv.module.FeatInv": "featinv.models.FeatInv",
    "featinv.optimisation.PixelOptimisation": "featinv.models.PixelOptimization",
    "featinv.original.AbsentBackbone": "featinv.interop.official.AbsentBackbone",
    "featinv.sampling.Sampler": "featinv.sampling.SamplerConfig",
    "featinv.stable_diffusion.Prompts": "featinv.interop.stable_diffusion.Prompts",
    "featinv.stable_diffusion.load_prompts": "featinv.interop.stable_diffusion.load_prompts",
    "featinv.stable_diffusion.load_unet": "featinv.interop.stable_diffusion.load_unet",
    "featinv.stable_diffusion.load_vae": "featinv.interop.stable_diffusion.load_vae",
}


def build_model(config: dict) -> nn.Module:
    """Build an untrained model from its config.

    Args:
        config: Nested `_target_` nodes with all values resolved, as in `configs/model`.

    Raises:
        InputError: Not the config of a model, a `_target_` that is not in `TARGETS`, or a value
            that a class rejects.
    """
    target = config.get("_target_", "nothing")
    if ALIASES.get(target, target) not in MODELS:
        raise InputError(f"The config builds '{target}', expected {' or '.join(MODELS)}.")
    config = upgrade(config)
    model = instantiate(config)
    model.config = map_paths(config, _absolute)
    return model


def upgrade(config: dict) -> dict:
    """Return a model's config, perhaps of an earlier version, with current keys.

    Keys of discontinued losses and of discontinued guidance are dropped.
    """
    config = {key: value for key, value in config.items() if key != "consistency"}
    if sampler := config.get("sampler"):
        renamed = {"network_error": "epsilon_scaling"}
        replaced = ("forward_guidance_scale", "feature_guidance_iterations")
        if old := set(sampler) & {*renamed, *replaced, "feature_guidance_steps"}:
            dropped = old - set(renamed) | {"feature_guidance_scale"}
            sampler = {renamed.get(k, k): v for k, v in sampler.items() if k not in dropped}
            config["sampler"] = sampler
    return config


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return trained weights, perhaps of an earlier version, by their current names."""
    before, now = "controlnet.controlnet_cond_embedding.", "feature_encoder.0."
    return {key.replace(before, now): value for key, value in state.items()}


def _absolute(name: str) -> str:
    """Make an existing path absolute."""
    return os.path.abspath(name) if name not in NAMES and Path(name).exists() else name


def find_paths(config: dict, file: Path) -> dict:
    """Return a model's config with its paths updated, if files have moved.

    Args:
        config: Of a model.
        file: The file with the config.
    """
    return map_paths(config, lambda name: name if name in NAMES else find_near(name, file))


def instantiate(node: object) -> object:
    """Build a config's `_target_` nodes, innermost first, like Hydra's `instantiate`.

    Raises:
        InputError: A `_target_` that is not in `TARGETS`, or values that it rejects.
    """
    if isinstance(node, list):
        return [instantiate(value) for value in node]
    if not isinstance(node, dict):
        return node
    target = node.get("_target_")
    target = ALIASES.get(target, target)
    if target is not None and target not in TARGETS:
        raise InputError(
            f"The model's config names '{target}', which is not one of the classes that a "
            f"model may be built from: {', '.join(sorted(TARGETS))}."
        )
    values = {k: instantiate(v) for k, v in node.items() if k not in ("_target_", "_partial_")}
    if target is None:
        return values
    module, name = target.rsplit(".", 1)
    make = getattr(import_module(module), name)
    if node.get("_partial_"):
        return partial(make, **values)
    try:
        return make(**values)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"The configuration of {name} does not fit: {reason}.") from error


def save_model(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write trained weights, config and the hashes of the frozen parts to one file, atomically.

    Args:
        model: A trained model.
        path: The `.safetensors` file.
        dtype: Type to convert the weights to; None keeps theirs.
    """
    state = model.trained().state_dict()
    if dtype is not None:
        state = {key: value.to(dtype) for key, value in state.items()}
    config = relocate(model.config, os.path.abspath(Path(path).parent), FOLDER)
    metadata = {"config": json.dumps(config), "frozen": json.dumps(model.frozen_hashes())}
    save_tensors(path, state, metadata)


def load_model(path: str | Path) -> nn.Module:
    """Load a trained model, in eval mode, on the CPU.

    Looks for its prior and its backbone's weights where they were and near the checkpoint, since a
    run may have moved with or without them.

    Args:
        path: A run's folder, a `.safetensors` file of `save_model`, a Lightning checkpoint of a run
            (its averaged weights are loaded, if any), one of `SHIPPED`, or `hf://owner/name`.

    Raises:
        InputError: A missing or corrupt file, or frozen weights that are missing or have changed.
    """
    path = find_checkpoint(path)
    config, frozen, state = read_checkpoint(path)
    config = relocate(upgrade(config), FOLDER, os.path.abspath(path.parent))
    config = find_paths(config, path)
    frozen_parts = {
        name: _build_frozen(name, config[name], digest, path)
        for name, digest in frozen.items()
        if name in config
    }
    model = build_model(config | frozen_parts)
    model.config, model.source = config, path
    model.check_frozen(frozen)
    model.check_trained(state)
    model.load_state_dict(state, strict=False)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Give a model the trained weights of another, perhaps of another backbone or prior.

    Args:
        model: An untrained model.
        path: The other, as for `load_model`; nothing but its trained weights is read.

    Raises:
        InputError: A missing or corrupt file, or another architecture.
    """
    _, _, state = read_checkpoint(find_checkpoint(path))
    model.check_trained(state)
    model.load_state_dict(state, strict=False)


def _build_frozen(name: str, config: dict, digest: str, checkpoint: Path) -> object:
    """Build a frozen part of a model; if its file is missing, raise an error with its hash."""
    try:
        return instantiate(config)
    except InputError as error:
        raise InputError(
            f"{error} The checkpoint '{checkpoint}' was trained with the {name} whose weights "
            f"have the SHA-256 {digest}: expected it there, or beside the checkpoint's folder."
        ) from error


def slim(path: str | Path, file: str | Path, sampler: dict | None = None) -> None:
    """Write the trained weights of a model in half precision.

    `load_model` reads the file like any other, and computes in float32. Rounding changes the
    weights: to train on a slim prior, train on this file.

    Args:
        path: The model, as for `load_model`.
        file: The `.safetensors` file to write.
        sampler: New sampler values for the model, e.g. `{"num_steps": 10}`.

    Raises:
        InputError: As `load_model`; weights beyond float16's range; or a bad sampler value.
    """
    model = load_model(path)
    if sampler:
        model.settings(**sampler)  # checks the values
        model.config.get("sampler", model.config).update(sampler)
    for name, weights in model.trained().state_dict().items():
        if weights.abs().max() > torch.finfo(torch.float16).max:
            raise InputError(
                f"The weights '{name}' reach {weights.abs().max():g}, expected at most "
                f"{torch.finfo(torch.float16).max:g}, the range of float16."
            )
    save_model(model, file, torch.float16)


def load_prior(path: str | Path) -> UNet2DConditionModel:
    """Return the UNet of a trained model, for another model to freeze or to train on.

    Args:
        path: As for `load_model`.

    Raises:
        InputError: As `load_model`; or the model did not train its UNet.
    """
    model = load_model(path)
    if "unet" not in model.trained():
        frozen = "unet" in model.frozen()
        reason = "it was trained on a frozen one" if frozen else f"it is a {type(model).__name__}"
        raise InputError(
            f"The checkpoint '{path}' holds no UNet, because {reason}: expected a run with "
            "model.train_unet=true, e.g. conditioning=none."
        )
    unet = model.unet
    unet.diffusion_config = model.diffusion.scheduler_config  # the one it was trained for
    # What compared images in its training, or that of its own prior, can be no later witness.
    unet.perceptual_networks = getattr(unet, "perceptual_networks", frozenset())
    if model.perceptual is not None:
        unet.perceptual_networks |= {(model.perceptual.network or model.backbone).name}
    return unet


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint file of a shipped name, `hf://owner/name`, a run's folder or a path.

    Raises:
        InputError: There is none; the message names what exists.
    """
    if str(path) in SHIPPED:
        return SHIPPED[str(path)]
    if str(path).startswith(PREFIX):
        path = fetch(str(path))
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
        f"file, or {' or '.join(SHIPPED)}; {describe_folder(path)}."
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
            return json.loads(metadata["config"]), json.loads(metadata["frozen"]), rename(state)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        averaged = checkpoint.get("callbacks", {}).get("EMA")
        state = averaged["weights"] if averaged else checkpoint["state_dict"]
        return checkpoint["featinv"]["config"], checkpoint["featinv"]["frozen"], rename(state)
    except PermissionError:
        raise
    except Exception as error:  # torch.load raises many types for a damaged file
        raise InputError(
            f"The checkpoint '{path}' cannot be read ({type(error).__name__}), so it is damaged or "
            "not FeatInv's: expected a file that train.py wrote."
        ) from error
