"""Checkpoints: save a model, rebuild it from its config, take over a trained UNet.

A model file is safetensors: the trained weights, with the config that builds the model and the
hashes of its frozen parts as metadata.
"""

import json
import os
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from featinv.utils.downloads import PREFIX, fetch
from featinv.utils.errors import InputError
from featinv.utils.files import atomic_write, describe_folder
from featinv.utils.paths import find_near, map_paths, relocate

MODEL_FILE = "model.safetensors"  # averaged weights: what `FeatInv.load` reads
LAST_FILE = Path("checkpoints") / "last.ckpt"  # the whole training state: what `resume` reads
ASSETS = Path(__file__).parent / "assets"
SHIPPED = {  # models that come with the package, by the names that stand for their files
    "imagenette-small": ASSETS / "imagenette-small" / MODEL_FILE,
    "imagenette-small-prior": ASSETS / "imagenette-small" / "prior.safetensors",
}
NAMES = {*SHIPPED, "timm", "pypi", "random"}  # stand for weights in a config, and are no paths
FOLDER = "{folder}"  # stands in a config for the folder that the checkpoint is in

# A config names the classes to build. Only these may be named, so that loading a checkpoint
# from somebody else cannot run anything but this.
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
# What configs saved by earlier versions name, and where it is now.
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
        InputError: Not the config of a model, a `_target_` that is not among `TARGETS`, or a value
            that a class refuses.
    """
    target = config.get("_target_", "nothing")
    if ALIASES.get(target, target) not in MODELS:
        raise InputError(f"The config builds '{target}', expected {' or '.join(MODELS)}.")
    config = upgrade(config)
    model = instantiate(config)
    model.config = map_paths(config, _absolute)
    return model


def upgrade(config: dict) -> dict:
    """Return a model's config, perhaps saved by an earlier version, with today's keys.

    What only training used, and guidance that was replaced by another kind, is left out.
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
    """Return trained weights, perhaps saved by an earlier version, by today's names."""
    before, now = "controlnet.controlnet_cond_embedding.", "feature_encoder.0."
    return {key.replace(before, now): value for key, value in state.items()}


def _absolute(name: str) -> str:
    """Return a path as it is from every folder; what is no path stays as it is."""
    return os.path.abspath(name) if name not in NAMES and Path(name).exists() else name


def find_paths(config: dict, file: Path) -> dict:
    """Return a config with its paths as they are now, if its run or what it stands on was moved.

    Args:
        config: Of a model.
        file: That the config is in.
    """
    return map_paths(config, lambda name: name if name in NAMES else find_near(name, file))


def instantiate(node: object) -> object:
    """Build what a config's `_target_` nodes name, innermost first, as Hydra's `instantiate` does.

    Raises:
        InputError: A `_target_` that is not among `TARGETS`, or values that it refuses.
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
    """Write the trained weights, the config and the hashes of what is frozen to one file.

    Args:
        model: A trained model.
        path: The `.safetensors` file; it appears at once and whole, or not at all.
        dtype: What the weights are rounded to; None keeps what they are.
    """
    state = {
        key: value.detach().to(dtype or value.dtype).contiguous()
        for key, value in model.trained().state_dict().items()
    }
    config = relocate(model.config, os.path.abspath(Path(path).parent), FOLDER)
    metadata = {"config": json.dumps(config), "frozen": json.dumps(model.frozen_hashes())}
    with atomic_write(path) as file:
        file.write(save(state, metadata))


def load_model(path: str | Path) -> nn.Module:
    """Load a trained model, in eval mode, on the CPU.

    The prior or the backbone's weights that it stands on are looked for where they were, and
    near the checkpoint: a run may have been moved, together with them or to them.

    Args:
        path: A run's folder, a `.safetensors` file written by `save_model`, a Lightning checkpoint
            of a run (whose averaged weights are taken if there are any), or one of `SHIPPED`.

    Raises:
        InputError: Missing or corrupt file, or frozen weights missing or other than those it was
            trained with.
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


def _build_frozen(name: str, config: dict, digest: str, checkpoint: Path) -> object:
    """Build a frozen part of a model; if its file is missing, say which one of which hash."""
    try:
        return instantiate(config)
    except InputError as error:
        raise InputError(
            f"{error} The checkpoint '{checkpoint}' was trained with the {name} whose weights "
            f"have the SHA-256 {digest}: expected it there, or beside the checkpoint's folder."
        ) from error


def slim(path: str | Path, file: str | Path, sampler: dict | None = None) -> None:
    """Write the trained weights of a model in half precision, for others to load.

    `load_model` reads such a file as any other, and calculates in float32. A model that is to
    stand on a prior written so has to be trained on that file: rounding changes the weights.

    Args:
        path: The model, as for `load_model`.
        file: The `.safetensors` file to write.
        sampler: Values that the model is to draw with from now on, e.g. `{"num_steps": 10}`.

    Raises:
        InputError: As `load_model`; weights beyond the range of float16; or a value that the
            sampler refuses.
    """
    model = load_model(path)
    told = sampler or {}
    model.settings(**told)  # refuses what does not fit
    if told:
        model.config["sampler"] |= told
    for name, weights in model.trained().state_dict().items():
        if weights.abs().max() > torch.finfo(torch.float16).max:
            raise InputError(
                f"The weights '{name}' reach {weights.abs().max():g}, expected at most "
                f"{torch.finfo(torch.float16).max:g}, the range of float16."
            )
    save_model(model, file, torch.float16)


def load_prior(path: str | Path) -> UNet2DConditionModel:
    """Return the UNet of a trained model, to be frozen or trained on in another.

    Args:
        path: As for `load_model`.

    Raises:
        InputError: As `load_model`; or the model's own UNet was not trained.
    """
    model = load_model(path)
    if "unet" not in model.trained():
        raise InputError(
            f"The checkpoint '{path}' holds no UNet, it was trained on a frozen one: "
            "expected a run with model.train_unet=true, e.g. conditioning=none."
        )
    model.unet.diffusion_config = model.diffusion.scheduler_config  # what it was trained for
    return model.unet


def find_checkpoint(path: str | Path) -> Path:
    """Return the file that a shipped name, `hf://owner/name`, a run's folder or a path stands for.

    Raises:
        InputError: There is none; the sentence names what is there.
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
