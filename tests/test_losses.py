"""The losses beside the diffusion loss: consistency of the features, alignment of their encoder."""

import pytest
import torch
from torch.nn.functional import normalize

from featinv import InputError
from featinv.checkpoints import build_model, load_model, save_model
from featinv.losses import Consistency
from featinv.utils.seeding import make_generator

CONFIG = {"_target_": "featinv.losses.Consistency", "weight": 0.5, "max_timestep": 500}
TIMESTEPS = torch.tensor([499, 500, 20])


def losses(model, images, keep=(True, True, True), timesteps=TIMESTEPS) -> torch.Tensor:
    generators = [make_generator(0, i) for i in range(len(images))]
    return model.losses(images, timesteps, torch.tensor(keep), generators)


@pytest.mark.parametrize("conditioning", ["spatial", "pooled"])
def test_the_loss_is_that_of_the_predicted_image(tiny_config, wake, images, conditioning):
    tiny_config["conditioning"] = conditioning
    torch.manual_seed(0)
    model = wake(build_model(tiny_config))
    diffusion = losses(model, images)
    predicted = []
    model.denoise = keep_first_result(model.denoise, predicted)
    model.consistency = Consistency(weight=0.5, max_timestep=500)
    with_consistency = losses(model, images)
    assert with_consistency[1] == diffusion[1], "no loss where the noise is high"
    for i in (0, 2):
        generators = [make_generator(0, i)]
        z_0 = model.codec.encode(images[i][None])
        eps = torch.randn(z_0.shape[1:], generator=generators[0])[None]
        alpha_bar = model.diffusion.alphas_cumprod[TIMESTEPS[i]]
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        z_t = a * z_0 + s * eps
        clean = a * z_t - s * predicted[0][i]  # the network predicts velocities
        seen = model.backbone.features(model.codec.decode(clean))
        asked = model.backbone.features(images[i][None])
        if conditioning == "pooled":
            seen, asked = (f.mean((2, 3), keepdim=True).expand_as(f) for f in (seen, asked))
        cosine = (normalize(seen, dim=1) * normalize(asked, dim=1)).sum(1).mean()
        expected = diffusion[i] + 0.5 * (1 - cosine)
        torch.testing.assert_close(with_consistency[i], expected, rtol=1e-4, atol=1e-5)


def keep_first_result(function, results: list):
    def call(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return call


def test_what_was_dropped_has_no_such_loss(awake_model, images):
    diffusion = losses(awake_model, images, keep=(False, True, False))
    awake_model.consistency = Consistency()
    assert torch.equal(losses(awake_model, images, keep=(False, True, False)), diffusion)
    assert not torch.equal(losses(awake_model, images), diffusion)


def test_its_gradient_reaches_the_controlnet_and_lowers_it(awake_model, images):
    """Through backbone, codec and UNet, which are frozen or not."""
    model = awake_model
    model.diffusion.loss = lambda prediction, *others: prediction.new_zeros(3)  # it alone
    model.consistency = Consistency(weight=1.0, max_timestep=1000)
    weight = model.controlnet.controlnet_cond_embedding.conv_out.weight
    before = losses(model, images).sum()
    (gradient,) = torch.autograd.grad(before, weight)
    step = 0.01 * gradient / gradient.norm()
    with torch.no_grad():
        weight -= step
        drop = float(before - losses(model, images).sum())
    assert drop == pytest.approx(float((gradient * step).sum()), rel=0.2) and drop > 0


def test_a_model_remembers_it(tiny_config, tmp_path):
    tiny_config["consistency"] = CONFIG
    save_model(build_model(tiny_config), tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").consistency == Consistency(0.5, 500)


@pytest.mark.parametrize("values", [{"weight": 0}, {"weight": -1.0}, {"max_timestep": 0}])
def test_values_out_of_their_range(values):
    name, value = next(iter(values.items()))
    with pytest.raises(InputError, match=f"model.consistency.{name} is {value}, expected above 0"):
        Consistency(**values)


# Alignment of the feature encoder


def test_alignment_is_the_distance_to_the_latents_first_activations(awake_model, images):
    model = awake_model
    diffusion = losses(model, images, keep=(True, False, True))
    model.alignment_weight = 0.5
    aligned = losses(model, images, keep=(True, False, True))
    assert aligned[1] == diffusion[1], "what was dropped has no features to encode"
    encoded = model.controlnet.controlnet_cond_embedding(model.backbone.features(images))
    target = model.unet.conv_in(model.codec.encode(images))
    for i in (0, 2):
        error = (encoded[i] - target[i]).square().sum() / target[i].numel()
        torch.testing.assert_close(aligned[i] - diffusion[i], 0.5 * error, rtol=1e-3, atol=1e-4)


def test_alignment_teaches_the_encoder_and_not_the_unet(awake_model, images):
    model = awake_model
    model.diffusion.loss = lambda prediction, *others: prediction.new_zeros(3)  # it alone
    model.alignment_weight = 1.0
    losses(model, images).sum().backward()
    encoder = model.controlnet.controlnet_cond_embedding
    assert all(p.grad.abs().max() > 0 for p in encoder.parameters())
    assert all(p.grad is None for p in model.unet.parameters())


def test_an_alignment_out_of_its_range(tiny_config):
    with pytest.raises(InputError, match="model.alignment_weight is -1, expected 0 or more"):
        build_model({**tiny_config, "alignment_weight": -1})
