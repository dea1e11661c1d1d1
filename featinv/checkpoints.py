"""Checkpoints: build a model from its config, save it, load it, and take over a prior.

python -m featinv.checkpoints slim RUN FILE               trained weights in half precision
python -m featinv.checkpoints export RUN OUT              a folder for diffusers' own classes
python -m featinv.checkpoints import ORIGINAL.ckpt OUT    from a checkpoint of the original code
"""

import copy
import json
import sys
from collections.abc import Sequence
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
from featinv.errors import ArgumentParser, InputError, cause_of, exit_code
from featinv.files import whole_file
from featinv.inverter import Inverter
from featinv.original import import_original as import_original  # offered here too

MODEL_FILE = "model.safetensors"  # averaged weights: what `FeatInv.load` reads
LAST_FILE = Path("checkpoints") / "last.ckpt"  # the whole training state: what `resume` reads
ASSETS = Path(__file__).parent / "assets"
SHIPPED = {  # models that come with the package, by the names that stand for their files
    "imagenette-small": ASSETS / "imagenette-small" / MODEL_FILE,
    "imagenette-small-prior": ASSETS / "imagenette-small" / "prior.safetensors",
}
FOLDER = "{folder}"  # stands in a config for the folder that the checkpoint is in

# A config names the classes to build. Only these may be named, so that loading a checkpoint
# from somebody else cannot run anything but this.
MODELS = (
    "featinv.module.FeatInv",
    "featinv.decoder.Decoder",
    "featinv.optimisation.PixelOptimisation",
)
TARGETS = frozenset(
    {
        *MODELS,
        "diffusers.AutoencoderKL",
        "diffusers.UNet2DConditionModel",
        "featinv.backbones.Backbone",
        "featinv.checkpoints.load_prior",
        "featinv.codecs.PatchPCA",
        "featinv.codecs.StableDiffusionVAE",
        "featinv.consistency.Consistency",
        "featinv.diffusion.Diffusion",
        "featinv.original.AbsentBackbone",
        "featinv.sampling.Sampler",
        "featinv.stable_diffusion.Prompts",
        "featinv.stable_diffusion.load_prompts",
        "featinv.stable_diffusion.load_unet",
        "featinv.stable_diffusion.load_vae",
        "torch.optim.Adam",
        "torch.optim.AdamW",
        "torch.optim.SGD",
    }
)


def build_model(config: dict) -> Inverter:
    """Build an untrained model from its config.

    Args:
        config: Nested `_target_` nodes of Hydra with all values resolved, as in `configs/model`.

    Raises:
        InputError: Not the config of a model, a `_target_` that is not among `TARGETS`, or a value
            that a class refuses.
    """
    if config.get("_target_") not in MODELS:
        raise InputError(
            f"The config builds '{config.get('_target_', 'nothing')}', expected "
            f"{' or '.join(MODELS)}."
        )
    _check_targets(config)
    try:
        model = instantiate(OmegaConf.create(config), _convert_="all")
    except HydraException as error:
        raise cause_of(error) from None
    model.config = copy.deepcopy(config)
    return model


def save_model(model: Inverter, path: str | Path, dtype: torch.dtype | None = None) -> None:
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
    metadata = {"config": json.dumps(model.config), "frozen": json.dumps(model.frozen_hashes())}
    with whole_file(path) as file:
        file.write(save(state, metadata))


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, as whole files.

    Lightning's own way writes to the folder for temporary files first; if that is on another disk
    than the checkpoint, it then copies the file over the previous checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        """Write a checkpoint; see Lightning's `CheckpointIO`."""
        with whole_file(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # what torch makes of a file that takes no more
                raise (error.__context__ or error) from None


def load_model(path: str | Path) -> Inverter:
    """Load a trained model, in eval mode, on the CPU.

    Args:
        path: A run's folder, a `.safetensors` file written by `save_model`, a Lightning checkpoint
            of a run (whose averaged weights are taken if there are any), or one of `SHIPPED`.

    Raises:
        InputError: Missing or corrupt file, or frozen weights other than those it was trained with.
    """
    path = find_checkpoint(path)
    config, frozen, state = read_checkpoint(path)
    model = build_model(relocate(config, FOLDER, str(path.parent)))
    model.config = config
    model.check_frozen(frozen)
    model.check_trained(state)
    model.load_state_dict(state, strict=False)
    return model.eval()


def slim(path: str | Path, file: str | Path, sampler: Sequence[str] = ()) -> None:
    """Write the trained weights of a model in half precision, for others to load.

    `load_model` reads such a file as any other, and calculates in float32. A model that is to
    stand on a prior written so has to be trained on that file: rounding changes the weights.

    Args:
        path: The model, as for `load_model`.
        file: The `.safetensors` file to write.
        sampler: Values that the model is to draw with from now on, e.g. `["num_steps=10"]`.

    Raises:
        InputError: As `load_model`; weights beyond the range of float16; or a value that the
            sampler refuses.
    """
    model = load_model(path)
    told = OmegaConf.to_container(OmegaConf.from_dotlist(list(sampler)))
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
    return model.unet


def find_checkpoint(path: str | Path) -> Path:
    """Return the file that a shipped model's name, a run's folder or a path stands for.

    Raises:
        InputError: There is none; the sentence names what is there.
    """
    if str(path) in SHIPPED:
        return SHIPPED[str(path)]
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
        f"file, or {' or '.join(SHIPPED)}; {what_is_there(path)}."
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


def relocate(node: object, old: str, new: str) -> object:
    """Return a config whose paths in one folder are paths in another."""
    if isinstance(node, dict):
        return {key: relocate(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [relocate(value, old, new) for value in node]
    if isinstance(node, str) and (node == old or node.startswith(f"{old}/")):
        return new + node[len(old) :]
    return node


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, 2 for bad arguments."""
    from featinv.export import export_model, import_checkpoint  # they stand on this module

    parser = ArgumentParser(prog="python -m featinv.checkpoints")
    commands = parser.add_subparsers(dest="command", required=True)
    to = commands.add_parser("export", help="write a folder that diffusers' own classes load")
    to.add_argument("path", metavar="RUN", help="a run's folder or a checkpoint file")
    to.set_defaults(run=export_model)
    from_ = commands.add_parser("import", help="read a checkpoint of the original FeatInv code")
    from_.add_argument("path", metavar="ORIGINAL.ckpt")
    from_.add_argument("--num-attention-heads", type=int, default=8)
    from_.add_argument(
        "--stable-diffusion",
        metavar="FOLDER_OR_ID",
        help="whose text encoder encodes the prompt, e.g. lambda/miniSD-diffusers",
    )
    from_.add_argument(
        "--backbone-weights", metavar="FILE", help="of the ConvNeXt, or 'timm' for the hub"
    )
    from_.set_defaults(run=import_checkpoint)
    for command in (to, from_):
        command.add_argument("folder", metavar="OUT", help="folder to write, new or empty")
    half = commands.add_parser("slim", help="write a model's weights in half precision")
    half.add_argument("path", metavar="RUN", help="a run's folder or a checkpoint file")
    half.add_argument("file", metavar="FILE", help="the .safetensors file to write")
    half.add_argument("sampler", metavar="KEY=VALUE", nargs="*", help="new values of the sampler")
    half.set_defaults(run=slim)
    options = vars(parser.parse_args(arguments))
    options.pop("command")
    run = options.pop("run")

    def tell() -> None:
        run(**options)
        print(f"Wrote {options.get('folder') or options['file']}.")

    return exit_code(tell)


if __name__ == "__main__":
    sys.exit(main())
