from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from featinv.backbones import Backbone
from featinv.data.photographs import load
from featinv.utils.errors import InputError
from featinv.utils.timm_models import PYPI_WEIGHTS, has_classes

# One small network of each kind, at 64 px: (layer, shape of its features)
FAMILIES = {
    "tf_efficientnet_lite0": [
        ("blocks.0", (16, 32, 32)),
        ("blocks.4", (112, 4, 4)),
        ("blocks.6", (320, 2, 2)),
    ],
    "resnet10t": [("act1", (64, 32, 32)), ("layer2", (128, 8, 8)), ("layer4", (512, 2, 2))],
    "convnext_atto": [("stages.0", (40, 16, 16)), ("stages.3", (320, 2, 2))],
    "vit_tiny_patch16_224": [("blocks.0", (192, 4, 4)), ("blocks.11", (192, 4, 4))],
    "vit_pwee_patch16_reg1_gap_256": [("blocks.3", (256, 4, 4)), ("blocks.15", (256, 4, 4))],
    # a class token and four registers
    "vit_tiny_patch16_dinov3_qkvb": [("blocks.5", (192, 4, 4)), ("blocks.11", (192, 4, 4))],
    "swinv2_tiny_window8_256": [("layers.1", (192, 8, 8)), ("layers.3", (768, 2, 2))],
}
LAYERS = [(name, *layer) for name, layers in FAMILIES.items() for layer in layers]
# The other heads pool the map of the last layer
READS_CLASS_TOKEN = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def backbones():
    """Return random backbones at 64 px, of 10 classes, by name and layer, made once."""
    made = {}

    def get(name: str, layer: str = "last", image_size: int = 64) -> Backbone:
        if (name, layer) not in made:
            backbone = Backbone(name, layer, "random", image_size, num_classes=10)
            generator = torch.Generator().manual_seed(0)
            for parameter in backbone.parameters():  # norms and biases start out trivial
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            made[name, layer] = backbone
        return made[name, layer]

    return get


@pytest.fixture
def views() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def naive_features(backbone: Backbone, images: Tensor) -> Tensor:
    """Read the layer's output with a hook while the whole classifier runs."""
    seen = []
    model, layer = backbone.model, backbone.layer
    tokens = hasattr(model, "num_prefix_tokens")
    normed = (tokens or "swin" in backbone.name) and layer == backbone.layer_names[-1]
    module = model.norm if normed else model.get_submodule(layer)
    handle = module.register_forward_hook(lambda *call: seen.append(call[-1]))
    model(backbone.preprocess(images))
    handle.remove()
    if tokens:
        prefix, (height, width) = model.num_prefix_tokens, backbone.feature_shape[1:]
        features = torch.empty(len(images), *backbone.feature_shape)
        for y in range(height):
            for x in range(width):
                features[:, :, y, x] = seen[0][:, prefix + y * width + x]
        return features
    return seen[0].permute(0, 3, 1, 2) if "swin" in backbone.name else seen[0]


@pytest.mark.parametrize(("name", "layer", "shape"), LAYERS)
@torch.no_grad()
def test_features_are_the_layers_own_output(name, layer, shape, backbones, views):
    backbone = backbones(name, layer)
    features = backbone.features(views)
    assert features.shape == (2, *shape)
    assert backbone.feature_shape == shape
    assert features.is_contiguous()
    torch.testing.assert_close(features, naive_features(backbone, views), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*FAMILIES, "mixer_s32_224"])
@torch.no_grad()
def test_several_layers_are_seen_in_one_pass_as_each_alone(name, backbones, views, monkeypatch):
    size = 64 if name in FAMILIES else 224
    names = backbones(name, image_size=size).layer_names
    layers = (names[-1], names[0], names[len(names) // 2])
    several = Backbone(name, list(layers), "random", size, num_classes=10)
    several.load_state_dict(backbones(name, image_size=size).state_dict())
    assert several.layers == layers and several.layer == layers[-1]
    assert several.feature_shape == several.feature_shapes[layers[-1]]
    passes = []
    preprocess = several.preprocess
    monkeypatch.setattr(several, "preprocess", lambda x: passes.append(x) or preprocess(x))
    together = several.all_features(views)
    assert len(passes) == 1 and tuple(together) == layers
    for layer in layers:
        alone = backbones(name, layer, image_size=size).features(views)
        assert alone.shape[1:] == several.feature_shapes[layer]
        torch.testing.assert_close(together[layer], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(several.features(views, layer), alone, atol=1e-4, rtol=1e-4)
    features, logits = several.features_and_logits(views, layers[1])
    torch.testing.assert_close(features, several.features(views, layers[1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, several.classify(views), atol=1e-4, rtol=1e-4)
    assert torch.equal(several.features(views), several.features(views, layers[-1]))


@torch.no_grad()
def test_logits_continue_from_the_last_of_several_layers(views):
    backbone = Backbone("resnet10t", ("last", "layer1"), weights="random", image_size=64)
    logits = backbone.logits(backbone.features(views, "layer4"))
    torch.testing.assert_close(logits, backbone.classify(views), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="Unknown layer among those.*'layer2'.*layer4, layer1"):
        backbone.features(views, "layer2")


@torch.no_grad()
def test_an_early_layer_runs_no_further_than_that(views, monkeypatch):
    backbone = Backbone("resnet10t", ("layer2", "last"), weights="random", image_size=64)
    backbone.model.layer3.register_forward_hook(lambda *call: pytest.fail("the network ran on"))
    backbone.features(views, "layer2")


def test_layers_that_one_pass_does_not_give_are_bad_input(monkeypatch):
    real = Backbone._maps

    def wrong(backbone, layers, *call, **options):
        maps, final = real(backbone, layers, *call, **options)
        return {layer: len(layers) * x for layer, x in maps.items()}, final

    monkeypatch.setattr(Backbone, "_maps", wrong)
    with pytest.raises(InputError, match="does not give its layers layer1, layer4 in one pass"):
        Backbone("test_resnet", ("layer1", "layer4"), weights="random")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_one_pass_gives_the_same_features_and_logits(name, backbones, views):
    backbone = backbones(name)
    assert backbone.layer == FAMILIES[name][-1][0]
    features, logits = backbone.features_and_logits(views)
    torch.testing.assert_close(features, backbone.features(views), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, backbone.classify(views), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_pass_gives_the_logits_of_an_early_layer_too(backbones, views):
    backbone = backbones("resnet10t", "layer2")
    features, logits = backbone.features_and_logits(views)
    assert features.shape[1:] == backbone.feature_shape
    torch.testing.assert_close(logits, backbone.classify(views), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != READS_CLASS_TOKEN])
@torch.no_grad()
def test_logits_continue_from_the_features(name, backbones, views):
    backbone = backbones(name)
    logits = backbone.classify(views)
    assert logits.std() > 1e-3
    torch.testing.assert_close(
        backbone.logits(backbone.features(views)), logits, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", [READS_CLASS_TOKEN, "test_nfnet", "ghostnet_050"])
def test_a_head_that_reads_more_than_the_features_is_bad_input(name):
    """A class token; a convolution and activation before the head; channels that do not fit."""
    backbone = Backbone(name, weights="random", image_size=64)
    with pytest.raises(InputError, match="class token or further layers"):
        backbone.logits(torch.zeros(1, *backbone.feature_shape))


def test_logits_of_an_early_layer_are_bad_input(backbones):
    backbone = backbones("resnet10t", "layer2")
    with pytest.raises(InputError, match="'layer4' only.*'layer2'"):
        backbone.logits(torch.zeros(1, *backbone.feature_shape))


def test_frozen_for_good_but_gradients_flow_to_the_images(backbones, views):
    backbone = backbones("resnet10t")
    parent = torch.nn.Sequential(backbone).train()
    assert parent.training
    assert backbone.train() is backbone
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())

    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    views.requires_grad_()
    backbone.features(views).square().mean().backward()
    assert views.grad.abs().min(dim=1).values.mean() > 0
    for key, value in backbone.state_dict().items():  # running statistics too
        assert torch.equal(value, before[key]), key


def test_the_gradient_is_that_of_finite_differences(views):
    backbone = Backbone("test_resnet", weights="random", image_size=32).double()
    backbone.preprocess = lambda images: (images / 2 + 0.5 - backbone.mean) / backbone.std
    views = views[:, :, :32, :32].double().requires_grad_()
    direction = torch.randn(views.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(backbone.features(views).square().sum(), views)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (
            backbone.features(views + sign * step * direction).square().sum() for sign in (1, -1)
        )
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "swinv2_tiny_window8_256"])
def test_preprocessing_is_timms_own_on_an_image_of_the_right_size(name, backbones):
    """The ViT's data config has mean and standard deviation 0.5, the others ImageNet's."""
    backbone = backbones(name)
    config = resolve_model_data_config(backbone.model)
    transform = create_transform(**{**config, "input_size": (3, 64, 64), "crop_pct": 1.0})
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    expected = transform(Image.fromarray(pixels))[None]
    torch.testing.assert_close(backbone.preprocess(image), expected, atol=1e-5, rtol=1e-5)


def test_families_differ_in_what_they_expect(backbones):
    assert backbones("resnet10t").mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert backbones("vit_tiny_patch16_224").mean.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize(("name", "mode"), [("resnet10t", "BICUBIC"), ("test_resnet", "BILINEAR")])
def test_preprocessing_resizes_as_pillow_does_with_the_models_own_filter(name, mode, backbones):
    backbone = backbones(name)
    photo = load("chelsea.png").crop((0, 0, 300, 300))
    resized = photo.resize((64, 64), Image.Resampling[mode])
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    result = backbone.preprocess(image) * backbone.std + backbone.mean
    assert (result[0] - expected).abs().max() < 1.6 / 255  # Pillow rounds to bytes twice


def test_images_of_any_size_and_shape_are_taken(backbones):
    backbone = backbones("resnet10t")
    for size in ((16, 16), (64, 64), (200, 200), (50, 90)):
        assert backbone.features(torch.zeros(1, 3, *size)).shape[1:] == backbone.feature_shape


@torch.no_grad()
def test_each_image_is_seen_alone(backbones, views):
    backbone = backbones("swinv2_tiny_window8_256")
    alone = torch.cat([backbone.features(view[None]) for view in views])
    torch.testing.assert_close(backbone.features(views), alone, atol=1e-4, rtol=1e-4)


# Encoders without classes

CONFIGS = Path(__file__).parents[1] / "configs" / "backbone"
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


def patch_tokens(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the tokens of the patches, out of all that the encoder ends with, (B, C, h, w)."""
    tokens = backbone.model.forward_features(backbone.preprocess(images))
    channels, height, width = backbone.feature_shape
    own = tokens[:, tokens.shape[1] - height * width :]
    return own.transpose(1, 2).reshape(len(images), channels, height, width)


@pytest.mark.parametrize("config", HEADLESS)
@torch.no_grad()
def test_an_encoder_without_classes_gives_features_and_says_so(config, views, monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))  # else seconds
    patch, (channels, _, _) = HEADLESS[config]
    backbone = headless(config, image_size=4 * patch)
    assert not backbone.classifies
    features, logits = backbone.features_and_logits(views)
    assert features.shape == (2, channels, 4, 4) and logits is None
    torch.testing.assert_close(features, patch_tokens(backbone, views), atol=1e-4, rtol=1e-4)
    for refused in (lambda: backbone.classify(views), lambda: backbone.logits(features)):
        with pytest.raises(InputError, match="no classes.*experiments/probe.py"):
            refused()


@pytest.mark.slow
@pytest.mark.parametrize("config", HEADLESS)
@torch.no_grad()
def test_an_encoder_without_classes_at_its_full_size(config, views):
    backbone = headless(config)
    assert backbone.feature_shape == HEADLESS[config][1]
    torch.testing.assert_close(
        backbone.features(views), patch_tokens(backbone, views), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_registers_are_not_part_of_the_features(views):
    backbone = headless("dinov2_small", name="vit_small_patch14_reg4_dinov2.lvd142m", image_size=56)
    assert backbone.model.num_prefix_tokens == 5  # a class token and four registers
    torch.testing.assert_close(
        backbone.features(views), patch_tokens(backbone, views), atol=1e-4, rtol=1e-4
    )


def test_an_early_layer_of_an_encoder_without_classes_runs_no_further_than_that(views):
    backbone = headless("dinov2_small", layer="blocks.2", image_size=56)
    backbone.model.blocks[3].register_forward_hook(lambda *call: pytest.fail("the network ran on"))
    assert backbone.features_and_logits(views)[0].shape == (2, 384, 4, 4)


@pytest.mark.parametrize("probed", ["blocks.11", "blocks.2", "blocks.7"])
@torch.no_grad()
def test_a_probe_stands_in_for_a_head(probed, views):
    """Of the layer that is inverted, of an earlier one or of a later one."""
    backbone = headless("dinov2_small", layer="blocks.7", image_size=56)
    own = headless("dinov2_small", layer=probed, image_size=56).features(views)
    before = backbone.features(views)
    backbone.use_probe(lambda features: features.mean(dim=(2, 3))[:, :10], probed, 10)
    assert backbone.classifies and backbone.num_classes == 10
    features, logits = backbone.features_and_logits(views)
    torch.testing.assert_close(features, before, atol=1e-4, rtol=1e-4)
    expected = own.mean(dim=(2, 3))[:, :10]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(backbone.classify(views), expected, atol=1e-4, rtol=1e-4)
    if probed == "blocks.7":
        assert torch.equal(backbone.logits(features), logits)
    else:
        with pytest.raises(InputError, match=f"continue from layer '{probed}' only"):
            backbone.logits(features)


def test_what_timm_counts_as_classes_tells_classifiers_from_encoders():
    """An embedding's width counts as classes in timm; a label set was learnt from labels."""
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name)
        if any(set_ in name for set_ in ("in1k", "in12k", "in21k", "in22k")):
            self_supervised = config.num_classes == 0  # on images of ImageNet
            assert has_classes(config.num_classes, None) or self_supervised, name
        elif any(
            kind in name for kind in ("clip", "siglip", "dinov2", "dinov3", ".mae", "pe_core")
        ):
            assert not has_classes(config.num_classes, None), name


def test_classes_that_were_asked_for_are_classes(views):
    backbone = Backbone("vit_xsmall_patch16_clip_224", weights="random", image_size=64)
    assert backbone.model.num_classes == 512 and not backbone.classifies
    options = {"weights": "random", "image_size": 64, "num_classes": 128}
    backbone = Backbone("vit_xsmall_patch16_clip_224", **options)
    assert backbone.classifies and backbone.classify(views).shape == (2, 128)


def test_weights_of_another_image_size_are_resampled(tmp_path):
    """As timm does for those of its hub: DINOv2's are for 518 px."""
    source = headless("dinov2_small", image_size=56)
    state = {key: value.contiguous() for key, value in source.model.state_dict().items()}
    save_file(state, tmp_path / "dinov2.safetensors")
    backbone = headless("dinov2_small", weights=str(tmp_path / "dinov2.safetensors"), image_size=98)
    assert backbone.feature_shape == (384, 7, 7)
    grid = source.model.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    expected = F.interpolate(grid, (7, 7), mode="bicubic", antialias=True)
    found = backbone.model.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (7, 7))
    torch.testing.assert_close(found, expected)
    assert torch.equal(
        backbone.model.blocks[3].mlp.fc1.weight, source.model.blocks[3].mlp.fc1.weight
    )


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return Backbone("tf_efficientnet_lite0", weights="pypi")


@pytest.mark.parametrize(("photo", "classes"), [("chelsea", {281, 282, 285}), ("coffee", {967})])
@torch.no_grad()
def test_the_weights_from_pypi_recognise_photographs(photo, classes, lite0):
    picture = load(f"{photo}.png")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((224, 224))
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    logits = lite0.classify(image)
    assert logits.argmax().item() in classes
    assert logits.softmax(1).max() > 0.3
    features = lite0.features(image)
    assert features.shape == (1, 320, 7, 7)
    torch.testing.assert_close(lite0.logits(features), logits, atol=1e-4, rtol=1e-4)


def test_the_weights_from_pypi_have_their_own_preprocessing(lite0):
    pixels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    images = torch.nn.functional.pad(pixels, (0, 208, 0, 208)) / 127.5 - 1
    result = lite0.preprocess(images)[:, :, :16, :16]
    torch.testing.assert_close(result, (pixels - 127) / 128, atol=1e-5, rtol=1e-5)


def test_random_weights_are_always_the_same_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(Backbone("test_resnet", weights="random").state_dict())
        if seed == 0:
            assert torch.equal(torch.rand(3), expected)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_load_from_a_file(suffix, tmp_path, views):
    torch.manual_seed(7)
    source = timm.create_model("test_resnet", num_classes=5).eval()
    path = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(source.state_dict(), path)
    backbone = Backbone("test_resnet", weights=str(path), num_classes=5)
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    assert backbone.classify(views).shape == (2, 5)


def test_a_file_with_other_weights_is_bad_input(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"weights\.pth.*'test_resnet'.*[Mm]issing key"):
        Backbone("test_resnet", weights=str(path))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"weights\.pth.*'test_resnet'"):
        Backbone("test_resnet", weights=str(path))
    (tmp_path / "weights.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="cannot be loaded"):
        Backbone("test_resnet", weights=str(tmp_path / "weights.safetensors"))


def test_a_file_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": Evil()}, path)
    with pytest.raises(InputError, match="cannot be loaded"):
        Backbone("test_resnet", weights=str(path))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "resnet5O"}, "Unknown backbone 'resnet5O': did you mean .*resnet50"),
        ({"name": "resnet50.a1_in2k"}, "pretrained backbone.*did you mean .*resnet50.a1_in1k"),
        ({"layer": "layer5"}, "layer of backbone 'test_resnet' 'layer5': .*layer4"),
        ({"layer": ""}, "choose from last, .*layer4"),
        ({"layer": ["layer1", "layer5"]}, "layer of backbone 'test_resnet' 'layer5': .*layer4"),
        ({"layer": ["layer4", "last"]}, r"layers .* \[layer4, layer4\], expected .* each once"),
        ({"layer": []}, r"layers of backbone 'test_resnet' are \[\], expected at least one"),
        ({"weights": "imagenet"}, "Unknown weights 'imagenet'.*timm, pypi, random"),
        ({"weights": "pypi"}, "choose from tf_efficientnet_lite0"),
        ({"name": "vit_tiny_patch16_224", "image_size": 8}, "size 16 of.*for example 16"),
        (
            {"name": "vit_small_patch14_dinov2", "image_size": 96},
            "is 96.*patch size 14.*example 98",
        ),
        ({"name": "vit_tiny_patch16_dinov3_qkvb", "image_size": 70}, "multiple of.*example 64"),
        ({"name": "swinv2_tiny_window8_256", "image_size": 66}, "patch size 4 .*example 64"),
        ({"name": "hiera_tiny_224"}, "'hiera_tiny_224' gives no features"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": -32}, "image_size is -32"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        Backbone(**{"name": "test_resnet", "weights": "random", **options})
    assert "\n" not in str(caught.value)


def test_a_model_without_intermediate_features_is_bad_input(monkeypatch):
    model = torch.nn.Identity()
    model.default_cfg = {"architecture": "test_resnet"}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: model)
    with pytest.raises(InputError, match="'test_resnet' offers no intermediate features"):
        Backbone("test_resnet", weights="random")


def test_a_hub_out_of_reach_is_told_with_a_way_out(monkeypatch):
    asked = []

    def create_model(name, pretrained=False, **options):
        asked.append(pretrained)
        raise OSError("Connection refused")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(InputError, match="'resnet50'.*hub.*OSError.*backbone.weights"):
        Backbone("resnet50", weights="timm")
    assert asked == [True]


def test_the_hubs_weights_are_asked_for_with_their_tag_and_size(monkeypatch):
    """The hub is a stub: what it is asked for, and that its model is taken as it is."""
    real, asked = timm.create_model, []

    def create_model(name, pretrained=False, **options):
        asked.append((name, pretrained, options))
        return real("test_vit", **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    backbone = Backbone("test_vit.r160_in1k", image_size=64, num_classes=7)
    assert asked == [("test_vit.r160_in1k", True, {"img_size": 64, "num_classes": 7})]
    assert backbone.feature_shape == (64, 4, 4)
    assert backbone.classify(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(PYPI_WEIGHTS, "tf_efficientnet_lite0", ("no_such_pypi_model", "Weights"))
    with pytest.raises(InputError, match="pip install no-such-pypi-model"):
        Backbone("tf_efficientnet_lite0", weights="pypi")
