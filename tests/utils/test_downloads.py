import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torchvision.models import AlexNet_Weights

from featinv.backbones import Backbone
from featinv.interop.stable_diffusion import load_prompts, load_unet, load_vae
from featinv.metrics import load_lpips
from featinv.utils import downloads
from featinv.utils.errors import InputError

LOADS = {
    "backbone": lambda: Backbone("test_resnet.r160_in1k"),
    "unet": lambda: load_unet("lambda/miniSD-diffusers"),
    "vae": lambda: load_vae("lambda/miniSD-diffusers"),
    "prompts": lambda: load_prompts("lambda/miniSD-diffusers"),
    "model": lambda: downloads.fetch("hf://somebody/inverter"),
    "lpips": load_lpips,
}


@pytest.fixture(params=["refused", "silent"])
def unreachable(request, monkeypatch, tmp_path):
    """A server that refuses connections, or accepts them and never answers; an empty cache."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(AlexNet_Weights.IMAGENET1K_V1.value, "url", f"{address}/alexnet.pth")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        assert downloads.SECONDS <= 4
        monkeypatch.setattr(downloads, "SECONDS", 0.5)
        yield tmp_path


def test_loading_from_an_unreachable_server_fails_within_seconds(unreachable):
    for load in LOADS.values():
        start = time.perf_counter()
        with pytest.raises(InputError, match=r"^[^\n]+$"):
            load()
        assert time.perf_counter() - start < downloads.SECONDS + 3
    assert not constants.HF_HUB_OFFLINE  # it may be back later


def test_the_cache_needs_no_hub(unreachable):
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


def test_a_hub_that_answers_is_used_unless_offline_is_set(monkeypatch):
    class Forbidding(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = HTTPServer(("127.0.0.1", 0), Forbidding)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with downloads.cache_if_unreachable():
            assert not constants.HF_HUB_OFFLINE
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not downloads.reachable()
    finally:
        server.shutdown()
        server.server_close()
