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


def test_reconstructions_have_the_promised_shape_and_range(awake_model, features):
    for parameter in awake_model.unet.conv_out.parameters():
        parameter.data *= 50  # far out of range
    result = awake_model.invert(features, num_samples=2)
    assert result.shape == (3, 2, 3, 32, 32) and result.dtype == torch.float32
    assert result.min() == -1 and result.max() == 1
    assert not result.requires_grad


@pytest.mark.parametrize("scheduler", ["ddim", "dpm_solver", "unipc"])
def test_invert_does_not_depend_on_the_batch(scheduler, awake_model, features):
    options = {"num_samples": 3, "num_steps": 5, "scheduler": scheduler, "seed": 4}
    whole = awake_model.invert(features, **options)
    for batch_size in (1, 2, 4):
        ours = awake_model.invert(features, **options, batch_size=batch_size)
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=0)
    for rows in ([2], [1, 0]):
        ours = awake_model.invert(features[rows], **options, indices=rows)
        torch.testing.assert_close(ours, whole[rows], atol=1e-4, rtol=0)
    fewer = awake_model.invert(features, **{**options, "num_samples": 1})
    torch.testing.assert_close(fewer, whole[:, :1], atol=1e-4, rtol=0)


def test_invert_with_fresh_noise_does_not_depend_on_the_batch(tiny_config, wake):
    tiny_config["sampler"] |= {"scheduler": "ddim", "eta": 1.0}
    model = wake(build(tiny_config))
    features = torch.randn(3, 512, 2, 2)
    whole = model.invert(features)
    torch.testing.assert_close(model.invert(features, batch_size=2), whole, atol=1e-4, rtol=0)
    model.sampler = model.sampler.override(eta=0.0)
    assert (model.invert(features) - whole).abs().max() > 0.05


def test_invert_depends_on_seed_sample_and_number(awake_model, features):
    features = features[:1].expand(3, -1, -1, -1)
    first = awake_model.invert(features, num_samples=2)
    torch.manual_seed(5)
    assert torch.equal(awake_model.invert(features, num_samples=2), first)  # and on nothing else
    draws = [
        *first.flatten(0, 1),
        *awake_model.invert(features, num_samples=2, seed=1).flatten(0, 1),
    ]
    for i, draw in enumerate(draws):
        for other in draws[:i]:
            assert (draw - other).abs().max() > 0.05


def test_invert_depends_on_the_features_and_on_guidance(awake_model, features):
    results = [
        awake_model.invert(features, guidance_scale=1.0),
        awake_model.invert(features.flip(0), guidance_scale=1.0),
        awake_model.invert(features, guidance_scale=3.0),
        awake_model.invert(features, guidance_scale=0.0),
    ]
    for i, result in enumerate(results):
        for other in results[:i]:
            assert (result - other).abs().max() > 1e-3
    unconditional = awake_model.invert(torch.zeros_like(features), guidance_scale=1.0)
    torch.testing.assert_close(results[3], unconditional, atol=1e-5, rtol=0)


def test_guidance_is_the_formula_at_every_step(awake_model, features):
    z_t, timesteps = torch.randn(3, 4, 4, 4), torch.full((3,), 999)
    with torch.no_grad():
        conditional = awake_model.denoise(z_t, timesteps, features=features)
        without = awake_model.denoise(z_t, timesteps, features=torch.zeros_like(features))
    outputs = []
    awake_model.unet.register_forward_hook(lambda module, args, output: outputs.append(output[0]))

    class Stop(Exception):
        pass

    def step(prediction: Tensor, timestep, sample, **_):
        outputs.append(prediction)
        raise Stop

    scheduler_class = type(awake_model.sampler.make_scheduler(awake_model.diffusion))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(scheduler_class, "step", lambda self, *args, **options: step(*args))
        patch.setattr("featinv.sampling.randn", lambda *_: z_t)
        awake_model.invert(features, guidance_scale=2.5)
    assert outputs[0].shape[0] == 6  # one pass for both
    expected = without + 2.5 * (conditional - without)
    torch.testing.assert_close(outputs[1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 3), (1.0, 3), (2.0, 6)])
def test_guidance_costs_a_second_pass_only_where_it_must(scale, rows, awake_model, features):
    calls = []
    awake_model.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    awake_model.invert(features, num_steps=2, guidance_scale=scale)
    assert calls == [rows] * 2


def test_samples_can_come_one_by_one(awake_model, features):
    whole = awake_model.invert(features, 3, batch_size=1)
    for s in range(3):
        one = awake_model.invert(features, first_sample=s, batch_size=1)
        torch.testing.assert_close(one[:, 0], whole[:, s], rtol=0, atol=1e-5)


def test_bfloat16_draws_nearly_the_same_in_float32(awake_model, features):
    exact = awake_model.invert(features)
    half = awake_model.invert(features, precision="bf16-mixed")
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().mean() < 0.03


def test_invert_takes_the_models_own_values(awake_model, features):
    """The config says dpm_solver, 4 steps, guidance 1.5."""
    own = awake_model.invert(features)
    named = awake_model.invert(features, num_steps=4, guidance_scale=1.5, scheduler="dpm_solver")
    assert torch.equal(own, named)
    assert not torch.equal(own, awake_model.invert(features, num_steps=5))
    assert not torch.equal(own, awake_model.invert(features, scheduler="ddim"))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"features": torch.zeros(2, 511, 2, 2)}, r"\(2, 511, 2, 2\), expected \(B, 512, 2, 2\)"),
        ({"features": torch.zeros(512, 2, 2)}, "'resnet10t' gives at layer 'layer4'"),
        ({"features": torch.zeros(0, 512, 2, 2)}, r"shape \(0, 512, 2, 2\)"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"scheduler": "euler"}, "Unknown scheduler 'euler'"),
        ({"seed": -1}, "seed is -1"),
        ({"first_sample": -2}, "first_sample is -2, expected 0 or more"),
        ({"precision": "bf16"}, "Unknown precision 'bf16': did you mean bf16-mixed"),
        ({"indices": [0]}, "1 indices for 2 feature maps"),
    ],
)
def test_invert_tells_what_it_cannot_use(values, sentence, tiny_model):
    with pytest.raises(InputError, match=sentence):
        tiny_model.invert(**{"features": torch.zeros(2, 512, 2, 2), **values})


# Feature guidance

GUIDED = {"scheduler": "ddim", "num_steps": 8, "eta": 1.0, "feature_guidance_scale": 3.0}


@pytest.mark.parametrize("conditioning", ["spatial", "pooled", "none"])
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


def test_guiding_every_step_of_a_trained_networks_cosine_schedule_does_not_diverge(features):
    """At t = 999, s_t^2 / a_t is about 10^4: unbounded guidance would saturate every pixel."""
    model = FeatInv.load("imagenette-small")
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) - 0.5
    drawn = model.invert(
        model.backbone.features(images),
        scheduler="ddim",
        num_steps=5,
        eta=1.0,
        feature_guidance_scale=10,
        polish_steps=1,
    )
    assert drawn.isfinite().all() and (drawn.abs() > 0.999).float().mean() < 0.2


def test_guidance_through_transformations_does_not_depend_on_the_batch(awake_model, features):
    options = {**GUIDED, "num_steps": 3, "num_samples": 2, "polish_steps": 1}
    options |= {"transform_noise": 0.1, "transform_shift": 1.0, "transform_zoom": 0.1}
    options["transform_views"] = 2
    whole = awake_model.invert(features, **options)
    ours = awake_model.invert(features[1:], **options, indices=[1, 2], batch_size=3)
    torch.testing.assert_close(ours, whole[1:], rtol=0, atol=2e-3)


def test_shared_noise_is_that_of_the_first_image(awake_model, features):
    same = features[:1].expand(2, -1, -1, -1)
    own = awake_model.invert(same, num_samples=2)
    shared = awake_model.invert(same, num_samples=2, shared_noise=True)
    torch.testing.assert_close(shared[0], own[0])
    torch.testing.assert_close(shared[1], own[0], rtol=0, atol=1e-4)
    assert (shared[1] - own[1]).abs().max() > 1e-3


# Several layers


def test_one_model_inverts_any_of_its_layers(tiny_config, wake, images):
    tiny_config["backbone"]["layer"] = ["layer2", "layer4"]
    torch.manual_seed(0)
    model = wake(build_model(tiny_config))
    drawn = {}
    for layer in model.backbone.layers:
        features = model.backbone.features(images, layer)
        drawn[layer] = model.invert(features, layer=layer)
        other = model.invert(0.5 * features, layer=layer)
        assert (drawn[layer] - other).abs().max() > 1e-3
    assert (drawn["layer2"] - drawn["layer4"]).abs().max() > 1e-3
    with pytest.raises(InputError, match="Unknown layer of the model 'layer3'"):
        model.invert(model.backbone.features(images, "layer2"), layer="layer3")
    with pytest.raises(InputError, match=r"expected \(B, 512, 2, 2\)"):
        model.invert(model.backbone.features(images, "layer2"))


def test_training_of_several_layers_gives_each_image_its_own(tiny_config, wake, images):
    tiny_config["backbone"]["layer"] = ["layer2", "layer4"]
    torch.manual_seed(0)
    model = wake(build_model(tiny_config))

    def losses(numbers: list[int]) -> torch.Tensor:
        generators = [make_generator(0, i) for i in range(3)]
        timesteps, keep = torch.tensor([100, 500, 900]), torch.ones(3, dtype=torch.bool)
        return model.losses(images, timesteps, keep, generators, torch.tensor(numbers))

    early, late, mixed = losses([0, 0, 0]), losses([1, 1, 1]), losses([0, 1, 0])
    expected = torch.stack([early[0], late[1], early[2]])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-4)
    assert (early - late).abs().min() > 1e-5
