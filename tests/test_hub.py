import base64
import hashlib
import json
import re
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from featinv import FeatInv
from featinv.checkpoints import build_model, load_model, read_checkpoint, save_model
from featinv.cli.convert import main
from featinv.codecs import PATCH_PCA
from featinv.hub import push_to_hub, stage
from featinv.models.base import state_hash
from featinv.utils import downloads
from featinv.utils.downloads import fetch
from featinv.utils.errors import InputError

COMMIT = "0" * 39 + "1"
NAME = "somebody/inverter"


class StandIn(BaseHTTPRequestHandler):
    """The part of the hub's protocol that pushes and fetches a model.

    The server has `address`, `files` (repository -> name -> content) and `downloads` (names).
    """

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, repos = urlsplit(self.path).path, self.server.files
        if path == "/":
            self.answer(b"")
        elif match := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", path):
            self.server.downloads += [match[2]] if self.command == "GET" else []
            content = repos[match[1]][match[2]]
            self.answer(content, ETag=f'"{digest(content)}"')
        elif (match := re.match(r"/api/models/(\w+/\w+)/(\w+)/", path)) and match[1] in repos:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                for name, content in repos[match[1]].items()
            ]
            info = {"id": match[1], "sha": COMMIT, "siblings": []}
            self.answer(tree if match[2] == "tree" else info)
        else:
            self.answer({}, 404, **{"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
        entries = [json.loads(line) for line in lines]
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            name = f"{entries[0]['organization']}/{entries[0]['name']}"
            self.server.files.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({})
        if "/preupload/" in path:
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **regular} for file in entries[0]["files"]]
            return self.answer({"files": files})
        name = re.match(r"/api/models/(\w+/\w+)/commit/", path)[1]
        for value in (entry["value"] for entry in entries if entry["key"] == "file"):
            self.server.files[name][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.server.address}/{name}/commit/{COMMIT}"
        self.answer({"commitUrl": url, "commitOid": COMMIT})

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": len(body),
            "X-Repo-Commit": COMMIT,
            **headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.files, server.downloads = {}, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
    for name, value in (
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("HF_HUB_OFFLINE", False),
        ("ENDPOINT", server.address),
        (
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.address + "/{repo_id}/resolve/{revision}/{filename}",
        ),
    ):
        monkeypatch.setattr(constants, name, value)
    yield server
    close(server)


def close(server: ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()
    downloads._answers.cache_clear()


@pytest.fixture
def run(awake_model, tmp_path):
    """A run's folder, as train.py leaves it."""
    folder = tmp_path / "runs" / "my_run"
    folder.mkdir(parents=True)
    save_model(awake_model, folder / "model.safetensors")
    (folder / "config.yaml").write_text(
        "data: {root: /home/somebody/imagenette, batch_size: 32}\ntrainer: {max_steps: 500}\n"
    )
    (folder / "table.md").write_text(
        "| row | cosine |\n|---|---|\n| reconstruction | 0.81 |\n\n"
        "Made by `python train.py data.root=/home/somebody/imagenette`.\n"
    )
    (folder / "reconstructions.png").write_bytes(b"a picture")
    return folder


@torch.no_grad()
def test_a_pushed_run_draws_the_same_once_fetched(run, hub, awake_model, images, capsys):
    main(["push", str(run), NAME])
    assert capsys.readouterr().out == f"Wrote {hub.address}/{NAME}.\n"
    model = FeatInv.load(f"hf://{NAME}")
    features = awake_model.backbone.features(images)
    assert torch.equal(model.invert(features), awake_model.eval().invert(features))
    assert model.config == awake_model.config
    assert sorted(hub.downloads) == ["config.json", "model.safetensors"]  # nothing else
    assert json.loads(hub.files[NAME]["config.json"]) == model.config


def test_a_changed_model_is_pushed_with_the_card_of_its_run(run, hub):
    model = FeatInv.load(run)
    next(model.controlnet.parameters()).data.fill_(0.5)
    assert model.push_to_hub(NAME, license="mit") == f"{hub.address}/{NAME}"
    assert state_hash(load_model(fetch(NAME))) == state_hash(model)
    files = hub.files[NAME]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "reconstructions.png"}
    card = files["README.md"].decode()
    for words in (
        "license: mit",
        "library_name: featinv",
        "from the spatial features of `last`\nin the frozen encoder `resnet10t`",
        f'FeatInv.load("hf://{NAME}")',
        "root: imagenette",
        "max_steps: 500",
        "| reconstruction | 0.81 |",
        "`python train.py data.root=imagenette`",
        "(reconstructions.png)",
    ):
        assert words in card
    assert b"/home" not in b"".join(files.values())


def test_the_card_of_a_model_without_a_run(awake_model, tmp_path):
    stage(awake_model, tmp_path, NAME)
    card = (tmp_path / "README.md").read_text()
    assert "Not evaluated." in card and "reconstructions.png" not in card


def test_the_files_that_a_run_needs_are_copied_without_pickles(tiny_config, wake, tmp_path):
    """A prior, weights for the backbone and a basis for the codec, in local folders."""
    elsewhere, staged = tmp_path / "elsewhere", tmp_path / "staged"
    elsewhere.mkdir()
    staged.mkdir()
    backbone = build_model(tiny_config).backbone.model
    for parameter in backbone.parameters():
        parameter.mul_(1.1)
    torch.save(backbone.state_dict(), elsewhere / "weights.pth")
    tiny_config["backbone"]["weights"] = str(elsewhere / "weights.pth")
    shutil.copy(PATCH_PCA, elsewhere / "own.safetensors")
    tiny_config["codec"]["basis"] = str(elsewhere / "own.safetensors")
    save_model(
        build_model({**tiny_config, "conditioning": "none"}), elsewhere / "model.safetensors"
    )
    tiny_config["unet"] = {"_target_": "featinv.checkpoints.load_prior", "path": str(elsewhere)}
    tiny_config["train_unet"] = False
    model = wake(build_model(tiny_config)).eval()
    save_model(model, tmp_path / "run" / "model.safetensors")

    stage(tmp_path / "run", staged, NAME)
    for file in elsewhere.iterdir():
        file.unlink()  # as on another machine
    moved = staged.rename(tmp_path / "moved")
    assert state_hash(load_model(moved)) == state_hash(model)
    assert {file.suffix for file in moved.iterdir()} == {".safetensors", ".json", ".md"}
    assert "`prior.safetensors`" in (moved / "README.md").read_text()
    for name in ("model.safetensors", "prior.safetensors"):
        assert str(tmp_path) not in json.dumps(read_checkpoint(moved / name)[0])
    loaded = load_file(moved / "backbone.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in backbone.state_dict().items())


def test_a_model_on_stable_diffusion_names_it_by_its_id(tiny_config, stable_diffusion, tmp_path):
    loader = "featinv.interop.stable_diffusion.load_"
    for part, key in (("unet", "unet"), ("codec", "vae"), ("prompts", "prompts")):
        tiny_config[part] = {"_target_": f"{loader}{key}", "path": str(stable_diffusion)}
    tiny_config["train_unet"] = False
    model = build_model(tiny_config)
    with pytest.raises(InputError, match="local folder .*: expected stable_diffusion=ID"):
        stage(model, tmp_path, NAME)
    stage(model, tmp_path, NAME, stable_diffusion="lambda/miniSD-diffusers")
    config = read_checkpoint(tmp_path / "model.safetensors")[0]
    paths = {config[part]["path"] for part in ("unet", "codec", "prompts")}
    assert paths == {"lambda/miniSD-diffusers"}


def test_without_a_network_the_cache_is_used(run, hub):
    push_to_hub(run, NAME)
    folder = fetch(NAME)
    close(hub)
    assert fetch(NAME) == folder
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(InputError, match="cannot be reached.*'somebody/else' is not in the cache"):
        fetch("somebody/else")
    with pytest.raises(InputError, match="cannot be reached.*'somebody/inverter' cannot be pushed"):
        push_to_hub(run, NAME)


def test_a_bad_name_is_an_error(run):
    for ask in (fetch, partial(push_to_hub, run)):
        with pytest.raises(InputError, match="expected owner/name"):
            ask("somebody/in verter")


def test_a_refusal_is_an_error(run, hub, monkeypatch):
    with pytest.raises(InputError, match="has no model 'somebody/inverter'"):
        fetch(NAME)
    monkeypatch.setattr(StandIn, "do_POST", lambda self: self.answer({}, 403))
    with pytest.raises(InputError, match="refuses the request for 'somebody/inverter'") as error:
        push_to_hub(run, NAME)
    assert "\n" not in str(error.value)
