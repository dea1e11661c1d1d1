"""Share models through a hub: a run is pushed with all that it needs, and a card made from it."""

import copy
import json
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file
from torch import Tensor, nn

from featinv.checkpoints import (
    FOLDER,
    MODEL_FILE,
    SHIPPED,
    find_checkpoint,
    find_paths,
    read_checkpoint,
)
from featinv.utils.downloads import PREFIX, check_repo_id, explain, fetch, out_of_reach, reachable
from featinv.utils.errors import InputError
from featinv.utils.paths import relocate

__all__ = ["fetch", "push", "stage"]

PICTURE, TABLE = "reconstructions.png", "table.md"  # what an evaluation leaves in a run's folder
STABLE_DIFFUSION = ("load_unet", "load_vae", "load_prompts")
# A folder of the machine that a model was trained on is nobody else's business; its name is kept.
PATHS = re.compile(r"(?<![\w./:-])[~/][\w./@+-]*/")

CARD = """\
---
{metadata}
---

# {name}

Draws images of {image_size} px from {condition} `{backbone}`;
{millions:.1f} million trained parameters.

```python
from featinv import FeatInv

model = FeatInv.load("{prefix}{repo_id}")
reconstructions = model.invert(model.backbone.features(images))  # images in [-1, 1]
```

## Data

{data}

## Recipe

{recipe}

## Evaluation

{table}

## Licence

The trained weights are under {license}. {copied}The pretrained weights of the encoder and the
training images have licences of their own; none of the images is here.

## Limits

- The scores are of the images named above, and not of others.
- The cosine is taken through `{backbone}`, the very network that is inverted; feature guidance, if
  it is on, optimises it. Part of a high cosine may be what this network alone sees.
- What the features leave open is drawn as the training images make it likely: details may be
  invented. They are no evidence of what was in the photograph.
"""


def push(
    run: str | Path | nn.Module,
    repo_id: str,
    private: bool = False,
    license: str = "apache-2.0",
    stable_diffusion: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Push a model to a hub, for `FeatInv.load("hf://owner/name")`.

    Pushed are the trained weights with their config, the prior and the encoder's weights if they
    are files of this machine, and a card made from the run. All weights go as safetensors. Who
    pushes is known to huggingface_hub (`hf auth login`).

    Args:
        run: A run's folder, a checkpoint file, or a model.
        repo_id: `owner/name`; made if it is not there.
        private: Whether a repository that is made is private.
        license: Of the weights.
        stable_diffusion: Stable Diffusion's id on the hub, in place of a folder of this machine.
        endpoint: The hub's address; None takes huggingface_hub's own, `HF_ENDPOINT`.

    Returns:
        The repository's address.

    Raises:
        InputError: No such run, a hub out of reach or one that refuses, or a model that stands on
            files which others cannot have.
    """
    check_repo_id(repo_id)
    with TemporaryDirectory() as folder:
        stage(run, folder, repo_id, license, stable_diffusion)
        if not reachable(endpoint):
            raise out_of_reach(f"'{repo_id}' cannot be pushed", endpoint)
        api = HfApi(endpoint=endpoint)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        added = [CommitOperationAdd(str(path.relative_to(folder)), path) for path in files]
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.create_commit(repo_id, added, commit_message="Push a FeatInv")
        except HfHubHTTPError as error:
            raise explain(error, repo_id, endpoint) from error
    return str(url)


def stage(
    run: str | Path | nn.Module,
    folder: str | Path,
    repo_id: str,
    license: str = "apache-2.0",
    stable_diffusion: str | None = None,
) -> None:
    """Write into a folder what `push` pushes; arguments and errors as there."""
    folder = Path(folder)
    if isinstance(run, nn.Module):
        source, config = None, copy.deepcopy(run.config)
        state, frozen = run.trained().state_dict(), run.frozen_hashes()
        if FOLDER in json.dumps(config):
            raise InputError(
                "The model stands on files that lie beside its own: expected its run's folder or "
                "its file instead of the model."
            )
    else:
        source = find_checkpoint(run)
        config, frozen, state = read_checkpoint(source)
    carried = _Carried(folder, stable_diffusion)
    config = carried.write(config, frozen, state, MODEL_FILE, source)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    run_folder = Path(run) if not isinstance(run, nn.Module) and Path(run).is_dir() else None
    if run_folder and (run_folder / PICTURE).is_file():
        shutil.copy(run_folder / PICTURE, folder / PICTURE)
    card = _card(config, state, run_folder, repo_id, license, carried.names)
    (folder / "README.md").write_text(card)


class _Carried:
    """What a model stands on and others do not have: copied beside it, and named in its config."""

    def __init__(self, folder: Path, stable_diffusion: str | None) -> None:
        self.folder, self.stable_diffusion = folder, stable_diffusion
        self.names: list[str] = []  # of the files that were copied

    def write(
        self,
        config: dict,
        frozen: dict[str, str],
        state: dict[str, Tensor],
        name: str,
        source: Path | None,
    ) -> dict:
        """Write a model's file; return its config, which names nothing outside the folder."""
        if source is not None:
            config = relocate(config, FOLDER, os.path.abspath(source.parent))
            config = find_paths(config, source)
        config = self._rewrite(config, source)
        metadata = {"config": json.dumps(config), "frozen": json.dumps(frozen)}
        state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(state, self.folder / name, metadata)
        return config

    def _rewrite(self, node: object, source: Path | None) -> object:
        if isinstance(node, list):
            return [self._rewrite(value, source) for value in node]
        if not isinstance(node, dict):
            return node
        node = {key: self._rewrite(value, source) for key, value in node.items()}
        target = str(node.get("_target_", "")).rpartition(".")[2]
        if target == "load_prior" and str(node["path"]) not in SHIPPED:
            node["path"] = self._prior(node["path"])
        elif target == "Backbone" and node.get("weights", "timm") not in ("timm", "pypi", "random"):
            node["weights"] = self._encoder(node["weights"])
        elif target in STABLE_DIFFUSION and Path(node["path"]).is_dir():
            node["path"] = self._stable_diffusion(Path(node["path"]), target, source)
        return node

    def _name(self, kind: str) -> str:
        number = sum(name.startswith(kind) for name in self.names)
        self.names.append(f"{kind}{number or ''}.safetensors")
        return self.names[-1]

    def _prior(self, path: str) -> str:
        source = find_checkpoint(path)
        name = self._name("prior")
        self.write(*read_checkpoint(source), name, source)
        return f"{FOLDER}/{name}"

    def _encoder(self, path: str) -> str:
        if not Path(path).is_file():
            raise InputError(f"There are no weights '{path}' of the backbone: expected a file.")
        name = self._name("backbone")
        if path.endswith(".safetensors"):
            shutil.copy(path, self.folder / name)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = {key: value.contiguous() for key, value in state.items()}
            save_file(state, self.folder / name)
        return f"{FOLDER}/{name}"

    def _stable_diffusion(self, path: Path, target: str, source: Path | None) -> str:
        if self.stable_diffusion is not None:
            return self.stable_diffusion
        if source is None or path.resolve() != source.parent.resolve():
            raise InputError(
                f"The model stands on Stable Diffusion in the folder '{path}', which others do not "
                "have: expected stable_diffusion=ID, its name on the hub."
            )
        part = {"load_unet": "unet", "load_vae": "vae"}.get(target)  # of an imported checkpoint
        files = path.glob(f"{part}/*") if part else path.glob("prompts.safetensors")
        for file in files:
            if file.suffix in (".safetensors", ".json"):
                kept = self.folder / file.relative_to(path)
                kept.parent.mkdir(exist_ok=True)
                shutil.copy(file, kept)
        self.names.append(part or "prompts")
        return FOLDER


def _card(
    config: dict,
    state: dict[str, Tensor],
    run: Path | None,
    repo_id: str,
    license: str,
    copied: list[str],
) -> str:
    """Return the text of the model's card."""

    def read(name: str) -> str | None:
        return (run / name).read_text() if run and (run / name).is_file() else None

    trained = yaml.safe_load(read("config.yaml") or "null") or {}
    about = ("optimizer", "lr_schedule", "warmup_steps", "seed", "sampler")
    recipe = {key: config[key] for key in about if key in config}
    recipe |= {"trainer": trained["trainer"]} if trained else {}
    table = read(TABLE) or "Not evaluated."
    if read(TABLE) and (run / PICTURE).is_file():
        table += f"\n![Originals, reconstructions and their spread]({PICTURE})"
    names = ", ".join(f"`{name}`" for name in copied)
    text = CARD.format(
        metadata=ModelCardData(
            license=license, library_name="featinv", tags=["feature-inversion", "diffusion"]
        ).to_yaml(),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        prefix=PREFIX,
        image_size=config["image_size"],
        condition=_condition(config),
        backbone=config["backbone"].get("name", "of the original"),
        millions=sum(value.numel() for value in state.values()) / 1e6,
        data=_block(trained["data"]) if trained else "Not recorded.",
        recipe=_block(recipe),
        table=table,
        license=license,
        copied=f"Copied from elsewhere, under the licence there: {names}. " if copied else "",
    )
    return PATHS.sub("", text)


def _condition(config: dict) -> str:
    if config["conditioning"] == "none":
        return "nothing, as a prior for models that invert"
    layers = config["backbone"].get("layer", "last")
    names = ", ".join(f"`{name}`" for name in ([layers] if isinstance(layers, str) else layers))
    return f"the {config['conditioning']} features of {names}\nin the frozen encoder"


def _block(values: dict) -> str:
    return f"```yaml\n{yaml.safe_dump(values, sort_keys=False)}```"
