import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from featinv.backbones import Backbone
from featinv.interop.stable_diffusion import load_prompts, load_unet, load_vae
from featinv.utils import downloads
from featinv.utils.errors import InputError

LOADS = {
    "backbone": lambda: Backbone("test_resnet.r160_in1k"),
    "unet": lambda: load_unet("lambda/miniSD-diffusers"),
    "vae": lambda: load_vae("lambda/miniSD-diffusers"),
    "prompts": lambda: load_prompts("lambda/miniSD-diffusers"),
    "model": lambda: downloads.fetch("hf://somebody/inverter"),
}


@pytest.fixture(params=["refused", "silent"])
def unreachable(request, monkeypatch, tmp_path):
    """A hub that refuses to be asked, or takes the question and never answers; an empty cache."""
    with socket.socket() as hub_socket:
        hub_socket.bind(("127.0.0.1", 0))
        if request.param == "silent":
            hub_socket.listen()
        monkeypatch.setattr(
            constants, "ENDPOINT", f"http://127.0.0.1:{hub_socket.getsockname()[1]}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert downloads.SECONDS <= 4
        monkeypatch.setattr(downloads, "SECONDS", 0.5)
        yield tmp_path


@pytest.mark.parametrize("load", LOADS)
def test_a_hub_out_of_reach_is_told_within_seconds(load, unreachable):
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        LOADS[load]()
    assert time.perf_counter() - start < downloads.SECONDS + 3
    assert "\n" not in str(error.value)
    assert not constants.HF_HUB_OFFLINE  # it may be back later


def test_what_is_in_the_cache_needs_no_hub(unreachable):
    torch.manual_seed(7)
    state = timm.create_model("test_resnet").state_dict()
    repository = unreachable / "models--timm--test_resnet.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(state, snapshot / "model.safetensors")
    model = Backbone("test_resnet.r160_in1k", weights="timm").model
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_hub_that_answers_is_asked(monkeypatch):
    class Forbidding(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = HTTPServer(("127.0.0.1", 0), Forbidding)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        with downloads.cache_if_unreachable(address):
            assert not constants.HF_HUB_OFFLINE
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not downloads.reachable(address)  # nobody is asked
    finally:
        server.shutdown()
        server.server_close()
