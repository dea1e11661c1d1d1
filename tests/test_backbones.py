import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from featinv.backbones import Backbone
from featinv.data.photographs import load
from featinv.utils.errors import InputError

# One small network of each kind, at 64 px: the shapes of some layers, the last one among them.
FAMILIES = {
    "tf_efficientnet_lite0": {"blocks.0": (16, 32, 32), "blocks.6": (320, 2, 2)},
    "resnet10t": {"act1": (64, 32, 32), "layer2": (128, 8, 8), "layer4": (512, 2, 2)},
    "convnext_atto": {"stages.0": (40, 16, 16), "stages.3": (320, 2, 2)},
    "vit_tiny_patch16_224": {"blocks.0": (192, 4, 4), "blocks.11": (192, 4, 4)},
    "vit_pwee_patch16_reg1_gap_256": {"blocks.3": (256, 4, 4), "blocks.15": (256, 4, 4)},
    # a class token and four registers
    "vit_tiny_patch16_dinov3_qkvb": {"blocks.5": (192, 4, 4), "blocks.11": (192, 4, 4)},
    "swinv2_tiny_window8_256": {"layers.1": (192, 8, 8), "layers.3": (768, 2, 2)},
}


@pytest.fixture(scope="module")
def backbones():
    """Return random backbones at 64 px, of 10 classes and several layers, made once."""
    made = {}

    def get(name: str) -> Backbone:
        if name not in made:
            backbone = Backbone(name, list(FAMILIES[name]), "random", 64, num_classes=10)
            generator = torch.Generator().manual_seed(0)
            for parameter in backbone.parameters():  # norms and biases start out trivial
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            made[name] = backbone
        return made[name]

    return get


@pytest.fixture
def views() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def naive_features(backbone: Backbone, layer: str, images: Tensor) -> Tensor:
    """Read a layer's output with a hook while the whole classifier runs."""
    seen = []
    model = backbone.model
    tokens = hasattr(model, "num_prefix_tokens")
    normed = (tokens or "swin" in backbone.name) and layer == backbone.layer_names[-1]
    module = model.norm if normed else model.get_submodule(layer)
    handle = module.register_forward_hook(lambda *call: seen.append(call[-1]))
    model(backbone.preprocess(images))
    handle.remove()
    if tokens:
        prefix, shape = model.num_prefix_tokens, backbone.feature_shapes[layer]
        features = torch.empty(len(images), *shape)
        for y in range(shape[1]):
            for x in range(shape[2]):
                features[:, :, y, x] = seen[0][:, prefix + y * shape[2] + x]
        return features
    return seen[0].permute(0, 3, 1, 2) if "swin" in backbone.name else seen[0]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features_are_the_layers_own_output_alone_and_in_one_pass(name, backbones, views):
    backbone = backbones(name)
    assert backbone.feature_shapes == FAMILIES[name]
    together = backbone.all_features(views)
    for layer in FAMILIES[name]:
        expected = naive_features(backbone, layer, views)
        assert_near(backbone.features(views, layer), expected)
        assert_near(together[layer], expected)
    assert torch.equal(backbone.features(views), backbone.features(views, layer))  # the last


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_the_classifiers_own_from_images_and_from_features(name, backbones, views):
    backbone = backbones(name)
    expected = backbone.model(backbone.preprocess(views))
    assert expected.std() > 1e-3
    assert_near(backbone.classify(views), expected)
    for layer in backbone.layers:
        features, logits = backbone.features_and_logits(views, layer)
        assert_near(features, backbone.features(views, layer))
        assert_near(logits, expected)
    if name != "vit_tiny_patch16_224":  # whose head reads the class token
        assert_near(backbone.logits(backbone.features(views)), expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_nfnet", "ghostnet_050"])
def test_a_head_that_reads_more_than_the_features_is_bad_input(name):
    """A class token; a convolution and activation before the head; channels that do not fit."""
    backbone = Backbone(name, weights="random", image_size=64)
    with pytest.raises(InputError, match="class token or further layers"):
        backbone.logits(torch.zeros(1, *backbone.feature_shape))


@torch.no_grad()
def test_a_layer_that_the_backbone_was_not_made_with(views):
    backbone = Backbone("test_resnet", ("layer1", "layer2"), "random", 64)
    backbone.model.layer3.register_forward_hook(lambda *call: pytest.fail("the network ran on"))
    backbone.features(views, "layer2")
    with pytest.raises(InputError, match="'layer4' only.*'layer1, layer2'"):
        backbone.logits(torch.zeros(1, *backbone.feature_shape))
    with pytest.raises(
        InputError, match="Unknown layer of backbone 'test_resnet' 'layer3'.*layer2, layer1"
    ):
        backbone.features(views, "layer3")


def test_layers_that_one_pass_does_not_give_are_bad_input(monkeypatch):
    real = Backbone.maps

    def wrong(backbone, layers, *call, **options):
        maps, final = real(backbone, layers, *call, **options)
        return {layer: len(layers) * x for layer, x in maps.items()}, final

    monkeypatch.setattr(Backbone, "maps", wrong)
    with pytest.raises(InputError, match="does not give its layers layer1, layer4 in one pass"):
        Backbone("test_resnet", ("layer1", "layer4"), weights="random")


def test_frozen_for_good_but_gradients_flow_to_the_images(views):
    backbone = Backbone("test_resnet", weights="random", image_size=64)
    torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    views.requires_grad_()
    backbone.features(views).square().mean().backward()
    assert views.grad.abs().min(dim=1).values.mean() > 0
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_preprocessing_is_timms_own_on_an_image_of_the_right_size(name, backbones):
    """The ViT's data config has mean and standard deviation 0.5, the other's are ImageNet's."""
    backbone = backbones(name)
    config = resolve_model_data_config(backbone.model)
    transform = create_transform(**{**config, "input_size": (3, 64, 64), "crop_pct": 1.0})
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    expected = transform(Image.fromarray(pixels))[None]
    torch.testing.assert_close(backbone.preprocess(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "mode"), [("resnet10t", "BICUBIC"), ("test_resnet", "BILINEAR")])
def test_preprocessing_resizes_as_pillow_does_with_the_models_own_filter(name, mode):
    backbone = Backbone(name, weights="random", image_size=64)
    photo = load("chelsea.png").crop((0, 0, 300, 200))  # any size and shape
    resized = photo.resize((64, 64), Image.Resampling[mode])
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    result = backbone.preprocess(image) * backbone.std + backbone.mean
    assert (result[0] - expected).abs().max() < 1.6 / 255  # Pillow rounds to bytes twice


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layer": "layer5"}, "layer of backbone 'test_resnet' 'layer5': .*layer4"),
        ({"layer": ["layer4", "last"]}, r"layers .* \[layer4, layer4\], expected .* each once"),
        ({"layer": []}, r"layers of backbone 'test_resnet' are \[\], expected at least one"),
        ({"name": "hiera_tiny_224"}, "'hiera_tiny_224' gives no features"),
        ({"image_size": 0}, "image_size is 0"),
    ],
)
def test_what_cannot_be_used(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Backbone(**{"name": "test_resnet", "weights": "random", **options})


# Encoders without classes


@pytest.mark.parametrize("probed", ["blocks.1", "blocks.2", "blocks.3"])
@torch.no_grad()
def test_a_probe_stands_in_for_a_head(probed, views):
    """Of an earlier layer than the one that is inverted, of that one, or of a later one."""
    options = {"weights": "random", "image_size": 64}
    backbone, other = (
        Backbone("test_vit", layer, num_classes=0, **options) for layer in ("blocks.2", probed)
    )
    assert not backbone.classifies
    before, own = backbone.features(views), other.features(views)
    backbone.use_probe(lambda features: features.mean(dim=(2, 3))[:, :10], probed, 10)
    assert backbone.classifies and backbone.num_classes == 10
    features, logits = backbone.features_and_logits(views)
    assert_near(features, before)
    expected = own.mean(dim=(2, 3))[:, :10]
    assert_near(logits, expected)
    assert_near(backbone.classify(views), expected)
    if probed == "blocks.2":
        assert torch.equal(backbone.logits(features), logits)
    else:
        with pytest.raises(InputError, match=f"continue from layer '{probed}' only"):
            backbone.logits(features)


def test_an_encoder_has_classes_only_if_they_were_asked_for(views):
    """A CLIP model's embedding counts as classes in timm."""
    options = {"weights": "random", "image_size": 64}
    backbone = Backbone("vit_xsmall_patch16_clip_224", **options)
    assert backbone.model.num_classes == 512 and not backbone.classifies
    features, logits = backbone.features_and_logits(views)
    assert logits is None
    for refused in (lambda: backbone.classify(views), lambda: backbone.logits(features)):
        with pytest.raises(InputError, match="no classes.*experiments/probe.py"):
            refused()
    backbone = Backbone("vit_xsmall_patch16_clip_224", **options, num_classes=128)
    assert backbone.classifies and backbone.classify(views).shape == (2, 128)
