"""Share models on a hub: push a model with all that it needs, and a card that describes its run.

Like `featinv.checkpoints`, this imports no model class; `Inverter.push_to_hub` calls it.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn

from featinv.checkpoints import (
    ASSETS,
    FOLDER,
    MODEL_FILE,
    NAMES,
    find_checkpoint,
    find_paths,
    read_checkpoint,
)
from featinv.utils.downloads import check_repo_id, describe_hub_error, out_of_reach, reachable
from featinv.utils.errors import InputError
from featinv.utils.paths import hide_folders, relocate
from featinv.utils.tensor_files import read_state_dict, save_tensors

PICTURE, TABLE = "reconstructions.png", "table.md"  # of an evaluation, in a run's folder
STABLE_DIFFUSION = {"load_unet": "unet", "load_vae": "vae", "load_prompts": "prompts"}


def push_to_hub(
    run: str | Path | nn.Module,
    repo_id: str,
    private: bool = False,
    license: str = "apache-2.0",
    stable_diffusion: str | None = None,
) -> str:
    """Push a model to a hub, for `FeatInv.load("hf://owner/name")`.

    Pushes the trained weights with their config, a model card, and the prior's and the backbone's
    weights if they are local files; all weights as safetensors. huggingface_hub knows the server
    and the user (`HF_ENDPOINT`, `hf auth login`).

    Args:
        run: A run's folder, a checkpoint file, or a model.
        repo_id: `owner/name`; created if it does not exist.
        private: Whether a new repository is private.
        license: Licence of the weights.
        stable_diffusion: Stable Diffusion's id on the hub, to replace a local folder.

    Returns:
        The repository's address.

    Raises:
        InputError: No such run, the hub cannot be reached or refuses, or the model needs a local
            Stable Diffusion.
    """
    check_repo_id(repo_id)
    with TemporaryDirectory() as folder:
        stage(run, Path(folder), repo_id, license, stable_diffusion)
        if not reachable():
            raise out_of_reach(f"'{repo_id}' cannot be pushed")
        api = HfApi()
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Push a FeatInv")
        except HfHubHTTPError as error:
            raise describe_hub_error(error, repo_id) from error
    return str(url)


def stage(
    run: str | Path | nn.Module,
    folder: Path,
    repo_id: str,
    license: str = "apache-2.0",
    stable_diffusion: str | None = None,
) -> None:
    """Write what `push_to_hub` pushes to a folder; arguments and errors as there."""
    bundle = _Bundle(folder, stable_diffusion)
    if isinstance(run, nn.Module):
        source, config, frozen = run.source, run.config, run.frozen_hashes()
        state = run.trained().state_dict()
    else:
        source = find_checkpoint(run)
        config, frozen, state = read_checkpoint(source)
    config = bundle.add_model(config, frozen, state, MODEL_FILE, source)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    about = {}  # files in the run's folder that describe its training and evaluation
    for name in ("config.yaml", TABLE, PICTURE):
        for parent in source.parents[:2] if source else ():  # checkpoints are in a subfolder
            if (parent / name).is_file():
                about.setdefault(name, parent / name)
    if PICTURE in about:
        shutil.copy(about[PICTURE], folder)
    number = sum(value.numel() for value in state.values())
    (folder / "README.md").write_text(_card(config, number, about, repo_id, license, bundle.names))


class _Bundle:
    """A folder with a model and the files that it needs; its config names no file elsewhere.

    Args:
        folder: Folder to write to.
        stable_diffusion: See `push_to_hub`.

    Attributes:
        names: Names of the files that the model needs, which have licences of their own.
    """

    def __init__(self, folder: Path, stable_diffusion: str | None) -> None:
        self.folder, self.stable_diffusion = folder, stable_diffusion
        self.names: list[str] = []

    def add_model(
        self,
        config: dict,
        frozen: dict[str, str],
        state: dict[str, Tensor],
        name: str,
        source: Path | None,
    ) -> dict:
        """Write a model's file and the files that it needs; return its config."""
        if source is not None:
            config = find_paths(relocate(config, FOLDER, str(source.parent.absolute())), source)
        config = self._rewrite(config, source)
        metadata = {"config": json.dumps(config), "frozen": json.dumps(frozen)}
        save_tensors(self.folder / name, state, metadata)
        return config

    def _rewrite(self, node: object, source: Path | None) -> object:
        """Copy the files that a node of a config names to this folder; return the new node."""
        if isinstance(node, list):
            return [self._rewrite(value, source) for value in node]
        if not isinstance(node, dict):
            return node
        node = {key: self._rewrite(value, source) for key, value in node.items()}
        target = str(node.get("_target_", "")).rpartition(".")[2]
        if target == "load_prior" and node["path"] not in NAMES:
            node["path"] = self._add_prior(find_checkpoint(node["path"]))
        elif target == "Backbone" and node.get("weights", "timm") not in NAMES:
            node["weights"] = self._add_file(Path(node["weights"]), "backbone")
        elif target == "PatchPCA" and node.get("basis"):
            node["basis"] = self._add_file(Path(node["basis"]), "basis")
        elif target in STABLE_DIFFUSION and Path(node["path"]).is_dir():
            part = STABLE_DIFFUSION[target]
            node["path"] = self._add_stable_diffusion(Path(node["path"]), part, source)
        return node

    def _add_prior(self, source: Path) -> str:
        name = self._new_name("prior")
        self.add_model(*read_checkpoint(source), name, source)
        return f"{FOLDER}/{name}"

    def _add_file(self, path: Path, kind: str) -> str:
        if not path.is_file():
            raise InputError(f"The model's {kind} '{path}' is missing: expected a file.")
        name = self._new_name(kind)
        save_tensors(self.folder / name, read_state_dict(path))
        return f"{FOLDER}/{name}"

    def _add_stable_diffusion(self, path: Path, part: str, source: Path | None) -> str:
        if self.stable_diffusion is not None:
            return self.stable_diffusion
        if source is None or path.resolve() != source.parent.resolve():
            raise InputError(
                f"The model needs Stable Diffusion in the local folder '{path}': expected "
                "stable_diffusion=ID, its id on the hub."
            )
        # An imported checkpoint has it in the same folder.
        for file in (*path.glob(f"{part}/*"), *path.glob(f"{part}.safetensors")):
            if file.suffix in (".safetensors", ".json"):
                kept = self.folder / file.relative_to(path)
                kept.parent.mkdir(exist_ok=True)
                shutil.copy(file, kept)
        self.names.append(part)
        return FOLDER

    def _new_name(self, kind: str) -> str:
        number = sum(name.startswith(kind) for name in self.names)
        self.names.append(f"{kind}{number or ''}.safetensors")
        return self.names[-1]


def _card(
    config: dict,
    num_parameters: int,
    about: dict[str, Path],
    repo_id: str,
    license: str,
    copied: list[str],
) -> str:
    """Return the text of the model's card, with the metadata that the hub reads."""
    path = about.get("config.yaml")
    trained = yaml.safe_load(path.read_text()) if path else {}
    keys = ("optimizer", "lr_schedule", "warmup_steps", "seed", "sampler")
    recipe = {key: config[key] for key in keys if key in config}
    if trained:
        recipe["trainer"] = trained["trainer"]
    table = about[TABLE].read_text() if TABLE in about else "Not evaluated."
    if PICTURE in about:
        table += f"\n![Originals, reconstructions and their spread]({PICTURE})"
    names = ", ".join(f"`{name}`" for name in copied)
    metadata = ModelCardData(
        license=license, library_name="featinv", tags=["feature-inversion", "diffusion"]
    )
    text = (ASSETS / "model_card.md").read_text()
    text = text.format(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        image_size=config["image_size"],
        condition=_condition(config),
        backbone=config["backbone"].get("name", "of the original"),
        millions=num_parameters / 1e6,
        data=_block(trained["data"]) if trained else "Not recorded.",
        recipe=_block(recipe),
        table=table,
        license=license,
        copied=f"Copied from elsewhere, under the licence there: {names}. " if copied else "",
    )
    return hide_folders(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _condition(config: dict) -> str:
    if config["conditioning"] == "none":
        return "nothing, as a prior for models that invert"
    layers = config["backbone"].get("layer", "last")
    names = ", ".join(f"`{name}`" for name in ([layers] if isinstance(layers, str) else layers))
    return f"the {config['conditioning']} features of {names}\nin the frozen encoder"


def _block(values: dict) -> str:
    return f"```yaml\n{yaml.safe_dump(values, sort_keys=False)}```"
