import base64
import hashlib
import json
import re
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
from featinv.interop.hub import fetch, push, stage
from featinv.models.base import state_hash
from featinv.utils import downloads
from featinv.utils.errors import InputError

COMMIT = "0" * 39 + "1"


class StandIn(BaseHTTPRequestHandler):
    """The part of the hub's protocol by which a model is pushed and fetched."""

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = urlsplit(self.path).path
        files = self.server.files
        if path == "/":
            return self.answer(b"", body)
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/revision/\w+", path):
            if match[1] in files:
                return self.json({"id": match[1], "sha": COMMIT, "siblings": []})
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/tree/\w+", path):
            return self.json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                    for name, content in files[match[1]].items()
                ]
            )
        elif match := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", path):
            self.server.downloads += [match[2]] if body else []
            content = files[match[1]][match[2]]
            return self.answer(content, body, ETag=f'"{digest(content)}"')
        self.answer(b"{}", body, 404, **{"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path, files = urlsplit(self.path).path, self.server.files
        if path == "/api/repos/create":
            values = json.loads(content)
            repo_id = f"{values['organization']}/{values['name']}"
            files.setdefault(repo_id, {})
            return self.json({"url": f"{self.server.address}/{repo_id}"})
        if path == "/api/validate-yaml":
            return self.json({})
        repo_id = re.match(r"/api/models/(\w+/\w+)/", path)[1]
        if "/preupload/" in path:
            asked = json.loads(content)["files"]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return self.json({"files": [{"path": file["path"], **regular} for file in asked]})
        for line in content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[repo_id][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"{self.server.address}/{repo_id}/commit/{COMMIT}"
        self.json({"commitUrl": url, "commitOid": COMMIT})

    def json(self, value: object) -> None:
        self.answer(json.dumps(value).encode())

    def answer(self, content: bytes, body: bool = True, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        sent = {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **headers}
        for name, value in sent.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A hub on this machine, with an empty cache; `files` are what was pushed to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.files, server.downloads = {}, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


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
def test_a_pushed_run_draws_the_same_wherever_it_is_fetched(run, stand_in, awake_model, images):
    url = push(run, "somebody/inverter", endpoint=stand_in.address)
    assert url == f"{stand_in.address}/somebody/inverter"
    folder = fetch("hf://somebody/inverter", endpoint=stand_in.address)
    model = load_model(folder)
    features = awake_model.backbone.features(images)
    assert torch.equal(model.invert(features), awake_model.eval().invert(features))
    assert model.config == awake_model.config
    assert sorted(stand_in.downloads) == ["config.json", "model.safetensors"]  # nothing else
    assert json.loads((folder / "config.json").read_text()) == model.config


def test_push_and_load_by_name_from_the_command_line_on(run, stand_in, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", stand_in.address)
        assert main(["push", str(run), "somebody/inverter"]) == 0
    monkeypatch.setattr("featinv.checkpoints.fetch", partial(fetch, endpoint=stand_in.address))
    assert capsys.readouterr().out == f"Wrote {stand_in.address}/somebody/inverter.\n"
    model = FeatInv.load("hf://somebody/inverter")
    for ours, theirs in zip(model.parameters(), load_model(run).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_card_is_made_from_the_run_and_names_no_folder_of_the_machine(run, stand_in):
    push(run, "somebody/inverter", license="mit", endpoint=stand_in.address)
    files = stand_in.files["somebody/inverter"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "reconstructions.png"}
    card = files["README.md"].decode()
    for words in (
        "license: mit",
        "library_name: featinv",
        "from the spatial features of `last`\nin the frozen encoder `resnet10t`",
        'FeatInv.load("hf://somebody/inverter")',
        "root: imagenette",
        "max_steps: 500",
        "| reconstruction | 0.81 |",
        "`python train.py data.root=imagenette`",
        "(reconstructions.png)",
    ):
        assert words in card
    assert b"/home" not in b"".join(files.values())


def test_a_run_without_an_evaluation_says_so(awake_model, tmp_path):
    stage(awake_model, tmp_path, "somebody/inverter")
    card = (tmp_path / "README.md").read_text()
    assert "Not evaluated." in card and "reconstructions.png" not in card


def test_what_a_run_stands_on_is_carried_along_without_pickle(tiny_config, wake, tmp_path):
    """A prior with weights of its own for the backbone, in folders that others do not have."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    backbone = build_model(tiny_config).backbone.model
    for parameter in backbone.parameters():
        parameter.mul_(1.1)
    torch.save(backbone.state_dict(), elsewhere / "weights.pth")
    tiny_config["backbone"]["weights"] = str(elsewhere / "weights.pth")
    prior = build_model({**tiny_config, "conditioning": "none"})
    save_model(prior, elsewhere / "model.safetensors")
    tiny_config["unet"] = {"_target_": "featinv.checkpoints.load_prior", "path": str(elsewhere)}
    tiny_config["train_unet"] = False
    model = wake(build_model(tiny_config)).eval()
    run = tmp_path / "run" / "model.safetensors"
    run.parent.mkdir()
    save_model(model, run)

    staged = tmp_path / "staged"
    staged.mkdir()
    stage(run, staged, "somebody/inverter")
    for file in sorted(elsewhere.iterdir()):
        file.unlink()  # as on another machine
    moved = staged.rename(tmp_path / "moved")
    again = load_model(moved)
    assert state_hash(again) == state_hash(model)
    assert {file.suffix for file in moved.iterdir()} == {".safetensors", ".json", ".md"}
    assert "`prior.safetensors`" in (moved / "README.md").read_text()
    for file in moved.glob("*.safetensors"):
        if file.name.startswith(("model", "prior")):
            assert str(tmp_path) not in json.dumps(read_checkpoint(file)[0])
    loaded = load_file(moved / "backbone.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in backbone.state_dict().items())


def test_a_model_on_stable_diffusion_names_it_as_others_find_it(
    tiny_config, stable_diffusion, tmp_path
):
    loader = "featinv.interop.stable_diffusion.load_"
    path = str(stable_diffusion)
    for part, key in (("unet", "unet"), ("codec", "vae"), ("prompts", "prompts")):
        tiny_config[part] = {"_target_": f"{loader}{key}", "path": path}
    tiny_config["diffusion"] = {"_target_": "featinv.diffusion.Diffusion"}
    tiny_config["train_unet"] = False
    model = build_model(tiny_config)
    with pytest.raises(InputError, match="others do not have: expected stable_diffusion=ID"):
        stage(model, tmp_path, "somebody/inverter")
    stage(model, tmp_path, "somebody/inverter", stable_diffusion="lambda/miniSD-diffusers")
    config = read_checkpoint(tmp_path / "model.safetensors")[0]
    assert {config[part]["path"] for part in ("unet", "codec", "prompts")} == {
        "lambda/miniSD-diffusers"
    }


def test_a_fetched_model_needs_no_network_again(run, stand_in):
    push(run, "somebody/inverter", endpoint=stand_in.address)
    folder = fetch("somebody/inverter", endpoint=stand_in.address)
    stand_in.shutdown()
    stand_in.server_close()
    downloads._answers.cache_clear()
    assert fetch("somebody/inverter", endpoint=stand_in.address) == folder
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(InputError, match="out of reach.*'somebody/else' is not in the cache"):
        fetch("somebody/else", endpoint=stand_in.address)


def test_a_model_that_is_not_there(stand_in):
    with pytest.raises(InputError, match="has no model 'somebody/inverter'"):
        fetch("hf://somebody/inverter", endpoint=stand_in.address)


@pytest.mark.parametrize("name", ["inverter", "a/b/c", "somebody/in verter"])
def test_no_name_of_a_model(name, run, stand_in):
    with pytest.raises(InputError, match="expected owner/name"):
        fetch(name, stand_in.address)
    with pytest.raises(InputError, match="expected owner/name"):
        push(run, name, endpoint=stand_in.address)


def test_a_hub_that_refuses(run, stand_in, monkeypatch):
    monkeypatch.setattr(StandIn, "do_POST", lambda self: self.answer(b"{}", status=403))
    with pytest.raises(InputError, match="refuses what was asked of 'somebody/inverter'") as error:
        push(run, "somebody/inverter", endpoint=stand_in.address)
    assert "\n" not in str(error.value)


def test_nothing_is_pushed_without_a_network(run, stand_in):
    stand_in.shutdown()
    stand_in.server_close()
    with pytest.raises(InputError, match="out of reach.*'somebody/inverter' cannot be pushed"):
        push(run, "somebody/inverter", endpoint=stand_in.address)
