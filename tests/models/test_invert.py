"""Drawing: what `FeatInv.invert` promises, with every kind of guidance."""

import pytest
import torch
from torch import Tensor

from featinv.checkpoints import build_model
from featinv.metrics import spatial_cosine
from featinv.models.featinv import FeatInv
from featinv.utils.errors import InputError
from featinv.utils.seeding import make_generator


def build(config: dict, **values) -> FeatInv:
    torch.manual_seed(0)
    return build_model({**config, **values})


@pytest.fixture
def features(awake_model, images) -> Tensor:
    return awake_model.backbone.features(images)


def assert_all_differ(images: list[Tensor], least: float) -> None:
    for i, image in enumerate(images):
        for other in images[:i]:
            assert (image - other).abs().max() > least


def test_reconstructions_have_the_promised_shape_and_range(awake_model, features):
    for parameter in awake_model.unet.conv_out.parameters():
        parameter.data *= 50  # far out of range
    result = awake_model.invert(features, num_samples=2)
    assert result.shape == (3, 2, 3, 32, 32) and result.dtype == torch.float32
    assert result.min() == -1 and result.max() == 1
    assert not result.requires_grad


@pytest.mark.parametrize("sampler", [{"scheduler": "unipc"}, {"scheduler": "ddim", "eta": 1.0}])
def test_invert_does_not_depend_on_the_batch(sampler, awake_model, features):
    options = {"num_samples": 3, "num_steps": 5, "seed": 4, **sampler}
    whole = awake_model.invert(features, **options)
    for changed in ({"batch_size": 2}, {"batch_size": 1}):
        ours = awake_model.invert(features, **options | changed)
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=0)
    ours = awake_model.invert(features[[1, 0]], **options, indices=[1, 0])
    torch.testing.assert_close(ours, whole[[1, 0]], atol=1e-4, rtol=0)
    last = awake_model.invert(features, **options | {"num_samples": 1}, first_sample=2)
    torch.testing.assert_close(last, whole[:, 2:], atol=1e-4, rtol=0)


def test_invert_depends_on_seed_sample_and_number(awake_model, features):
    features = features[:1].expand(3, -1, -1, -1)
    first = awake_model.invert(features, num_samples=2)
    torch.manual_seed(5)
    assert torch.equal(awake_model.invert(features, num_samples=2), first)  # and on nothing else
    second = awake_model.invert(features, num_samples=2, seed=1)
    assert_all_differ([*first.flatten(0, 1), *second.flatten(0, 1)], least=0.05)


def test_invert_depends_on_the_features_and_on_guidance(awake_model, features):
    results = [
        awake_model.invert(features, guidance_scale=1.0),
        awake_model.invert(features.flip(0), guidance_scale=1.0),
        awake_model.invert(features, guidance_scale=3.0),
        awake_model.invert(features, guidance_scale=0.0),
    ]
    assert_all_differ(results, least=1e-3)
    unconditional = awake_model.invert(torch.zeros_like(features), guidance_scale=1.0)
    torch.testing.assert_close(results[3], unconditional, atol=1e-5, rtol=0)


def test_invert_takes_the_models_own_values(awake_model, features):
    """The config says dpm_solver, 4 steps, guidance 1.5."""
    own = awake_model.invert(features)
    named = awake_model.invert(features, num_steps=4, guidance_scale=1.5, scheduler="dpm_solver")
    assert torch.equal(own, named)
    others = [awake_model.invert(features, **v) for v in ({"num_steps": 5}, {"scheduler": "ddim"})]
    assert_all_differ([own, *others], least=1e-3)


def test_bfloat16_draws_nearly_the_same_in_float32(awake_model, features):
    exact = awake_model.invert(features)
    half = awake_model.invert(features, precision="bf16-mixed")
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().mean() < 0.03


def test_shared_noise_is_that_of_the_first_image(awake_model, features):
    same = features[:1].expand(2, -1, -1, -1)
    own = awake_model.invert(same, num_samples=2)
    shared = awake_model.invert(same, num_samples=2, shared_noise=True)
    torch.testing.assert_close(shared[0], own[0])
    torch.testing.assert_close(shared[1], own[0], rtol=0, atol=1e-4)
    assert (shared[1] - own[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"features": torch.zeros(2, 511, 2, 2)}, r"\(2, 511, 2, 2\), expected \(B, 512, 2, 2\)"),
        ({"features": torch.zeros(512, 2, 2)}, "'resnet10t' gives at layer 'layer4'"),
        ({"num_samples": 0}, "num_samples is 0: expected an integer of at least 1"),
        ({"precision": "bf16"}, "Unknown precision 'bf16': did you mean bf16-mixed"),
        ({"indices": [0]}, "1 indices for 2 feature maps"),
    ],
)
def test_invert_tells_what_it_cannot_use(values, sentence, tiny_model):
    with pytest.raises(InputError, match=sentence):
        tiny_model.invert(**{"features": torch.zeros(2, 512, 2, 2), **values})


# Feature guidance

GUIDED = {"scheduler": "ddim", "num_steps": 8, "eta": 1.0, "feature_guidance_scale": 3.0}


@pytest.mark.parametrize("conditioning", ["pooled", "none"])
def test_feature_guidance_brings_the_features_nearer(conditioning, tiny_config, features):
    """With a ControlNet, and of a prior without: then it is all there is."""
    model = build(tiny_config, conditioning=conditioning)
    expected = model.condition(features)
    drawn = [
        model.invert(features, **{**GUIDED, **more})[:, 0]
        for more in ({"feature_guidance_scale": 0}, {}, {"polish_steps": 8})
    ]
    seen = [model.condition(model.backbone.features(view)) for view in drawn]
    cosines = [float(spatial_cosine(s, expected).mean()) for s in seen]
    assert cosines[0] < cosines[1] < cosines[2]


def test_guidance_through_transformations_does_not_depend_on_the_batch(awake_model, features):
    options = {**GUIDED, "num_steps": 3, "num_samples": 2, "polish_steps": 1}
    options |= {"transform_noise": 0.1, "transform_shift": 1.0, "transform_zoom": 0.1}
    options["transform_views"] = 2
    whole = awake_model.invert(features, **options)
    ours = awake_model.invert(features[1:], **options, indices=[1, 2], batch_size=3)
    torch.testing.assert_close(ours, whole[1:], rtol=0, atol=2e-3)


# Several layers


@pytest.fixture
def layered(tiny_config, wake) -> FeatInv:
    """A model of two layers."""
    tiny_config["backbone"]["layer"] = ["layer2", "layer4"]
    return wake(build(tiny_config))


def test_one_model_inverts_any_of_its_layers(layered, images):
    early, late = (layered.backbone.features(images, layer) for layer in ("layer2", "layer4"))
    drawn = [
        layered.invert(factor * features, layer=layer)
        for layer, features in (("layer2", early), ("layer4", late))
        for factor in (1, 0.5)
    ]
    assert_all_differ(drawn, least=1e-3)
    with pytest.raises(InputError, match="Unknown layer of the model 'layer3'"):
        layered.invert(early, layer="layer3")
    with pytest.raises(InputError, match=r"expected \(B, 512, 2, 2\)"):
        layered.invert(early)


def test_training_of_several_layers_gives_each_image_its_own(layered, images):
    def losses(numbers: list[int]) -> Tensor:
        generators = [make_generator(0, i) for i in range(3)]
        timesteps, keep = torch.tensor([100, 500, 900]), torch.ones(3, dtype=torch.bool)
        return layered.losses(images, timesteps, keep, generators, torch.tensor(numbers))

    early, late, mixed = losses([0, 0, 0]), losses([1, 1, 1]), losses([0, 1, 0])
    expected = torch.stack([early[0], late[1], early[2]])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-4)
    assert (early - late).abs().min() > 1e-5
