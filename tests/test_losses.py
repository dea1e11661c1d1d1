"""The losses beside the diffusion loss."""

import pytest
import torch
from torch.nn.functional import normalize

from featinv import InputError
from featinv.checkpoints import build_model, load_model, load_prior, save_model
from featinv.losses import PerceptualLoss
from featinv.transforms import PixelNoise, ShiftAndZoom
from featinv.utils.seeding import make_generator

TIMESTEPS = torch.tensor([499, 980, 20])
EVERYTHING = torch.tensor([True, True, True])


def losses(model, images, keep=EVERYTHING, timesteps=TIMESTEPS) -> torch.Tensor:
    generators = [make_generator(0, i) for i in range(len(images))]
    return model.losses(images, timesteps, keep, generators)


def keep_first_result(function, results: list):
    def call(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return call


def test_the_perceptual_loss_is_that_of_the_predicted_image(awake_model, images):
    """Against the formula, layer by layer, for a network that predicts velocities."""
    model = awake_model
    diffusion = losses(model, images)
    predicted = []
    model.predict = keep_first_result(model.predict, predicted)
    layers = ["layer2", "layer4"]
    model.perceptual = PerceptualLoss(layers=layers, weight=0.5, signal_power=2.0)
    both = losses(model, images)
    for i in range(3):
        z_0 = model.codec.encode(images[i][None])
        eps = torch.randn(z_0.shape[1:], generator=make_generator(0, i))[None]
        alpha_bar = model.diffusion.alphas_cumprod[TIMESTEPS[i]]
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        clean = a * (a * z_0 + s * eps) - s * predicted[0][i]
        distances = []
        for layer in layers:
            index = [model.backbone.layer_names.index(layer)]
            seen, true = (
                model.backbone.model.forward_intermediates(
                    model.backbone.preprocess(view), indices=index, intermediates_only=True
                )[0]
                for view in (model.codec.decode(clean).clamp(-1, 1), images[i][None])
            )
            distances.append(1 - (normalize(seen, dim=1) * normalize(true, dim=1)).sum(1).mean())
        expected = diffusion[i] + 0.5 * alpha_bar**2 * sum(distances) / 2
        torch.testing.assert_close(both[i], expected, rtol=1e-3, atol=1e-4)


def test_both_images_are_transformed_alike(tiny_model, images):
    loss = PerceptualLoss(transforms=[ShiftAndZoom(3, 0.2), PixelNoise(0.3, 0.3)], signal_power=0)
    generators = [make_generator(0, i) for i in range(3)]
    alphas_cumprod = torch.full((3,), 0.5)

    def distance(predicted: torch.Tensor) -> torch.Tensor:
        generators = [make_generator(0, i) for i in range(3)]
        return loss(tiny_model.backbone, predicted, images, alphas_cumprod, generators)

    moved = ShiftAndZoom(3, 0.2)(images, alphas_cumprod, generators)
    assert (distance(moved) > distance(images)).all()


def test_images_of_little_signal_are_not_compared(tiny_model, images):
    alphas_cumprod = torch.tensor([0.2, 0.9, 0.6])
    noisy = images + 0.3 * torch.randn(images.shape, generator=make_generator(0, 9))

    def loss(min_signal: float, rows: list[int]) -> torch.Tensor:
        generators = [make_generator(0, i) for i in rows]
        perceptual = PerceptualLoss(transforms=[PixelNoise(0.3, 0.3)], min_signal=min_signal)
        seen = (noisy[rows], images[rows], alphas_cumprod[rows])
        return perceptual(tiny_model.backbone, *seen, generators)

    everything = loss(0, [0, 1, 2])
    torch.testing.assert_close(loss(0.5, [0, 1, 2]), everything * torch.tensor([0, 1, 1]))
    assert everything[0] > 0 and loss(0.5, [0]).tolist() == [0]


def test_its_gradient_reaches_the_encoder_and_lowers_it(awake_model, images):
    """Through backbone, codec and UNet, which are frozen or not."""
    model = awake_model
    model.diffusion.loss = lambda prediction, *others: prediction.new_zeros(3)  # it alone
    model.perceptual = PerceptualLoss()
    weight = model.feature_encoder[0].conv_out.weight
    before = losses(model, images).sum()
    (gradient,) = torch.autograd.grad(before, weight)
    step = 0.01 * gradient / gradient.norm()
    with torch.no_grad():
        weight -= step
        drop = float(before - losses(model, images).sum())
    assert drop == pytest.approx(float((gradient * step).sum()), rel=0.2) and drop > 0


def test_a_model_remembers_it(tiny_config, tmp_path):
    tiny_config["perceptual"] = {
        "_target_": "featinv.losses.PerceptualLoss",
        "layers": ["layer2"],
        "transforms": [{"_target_": "featinv.transforms.ShiftAndZoom", "shift": 2.0}],
    }
    save_model(build_model(tiny_config), tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.perceptual.layers == ("layer2",)
    assert loaded.perceptual.transforms == (ShiftAndZoom(2.0),)
    prior = load_prior(tmp_path / "model.safetensors")
    assert prior.perceptual_networks == {"resnet10t"}


def test_a_prior_trained_on_a_prior_remembers_the_networks_of_both(tiny_config, tmp_path):
    loss = {"_target_": "featinv.losses.PerceptualLoss"}
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_model(build_model(tiny_config | {"perceptual": loss}), first)
    other = {"_target_": "featinv.backbones.Backbone", "name": "test_resnet", "weights": "random"}
    tiny_config["perceptual"] = loss | {"network": other}
    tiny_config["unet"] = {"_target_": "featinv.checkpoints.load_prior", "path": str(first)}
    save_model(build_model(tiny_config), second)
    assert load_prior(second).perceptual_networks == {"resnet10t", "test_resnet"}


def test_bad_input(tiny_model, images):
    with pytest.raises(InputError, match="model.perceptual.weight is 0, expected above 0"):
        PerceptualLoss(weight=0)
    with pytest.raises(InputError, match="model.perceptual.min_signal is 1, expected from 0"):
        PerceptualLoss(min_signal=1)
    tiny_model.perceptual = PerceptualLoss(layers=["layer9"])
    with pytest.raises(InputError, match="Unknown layer of backbone 'resnet10t' 'layer9'"):
        losses(tiny_model, images)


# Alignment of the feature encoder


def test_alignment_is_the_distance_to_the_latents_first_activations(awake_model, images):
    model, keep = awake_model, torch.tensor([True, False, True])
    diffusion = losses(model, images, keep)
    model.alignment_weight = 0.5
    aligned = losses(model, images, keep)
    assert aligned[1] == diffusion[1], "what was dropped has no features to encode"
    encoded = model.feature_encoder(model.backbone.features(images), model.backbone.layer)
    target = model.unet.conv_in(model.codec.encode(images))
    for i in (0, 2):
        error = (encoded[i] - target[i]).square().sum() / target[i].numel()
        torch.testing.assert_close(aligned[i] - diffusion[i], 0.5 * error, rtol=1e-3, atol=1e-4)


def test_alignment_teaches_the_encoder_and_not_the_unet(awake_model, images):
    model = awake_model
    model.diffusion.loss = lambda prediction, *others: prediction.new_zeros(3)  # it alone
    model.alignment_weight = 1.0
    losses(model, images).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.feature_encoder.parameters())
    assert all(p.grad is None for p in model.unet.parameters())


def test_alignment_takes_a_unet_in_bfloat16(tiny_config, images):
    tiny_config["alignment_weight"] = 1.0
    tiny_config["train_unet"] = False
    model = build_model(tiny_config)
    model.unet.to(torch.bfloat16)
    assert losses(model, images).isfinite().all()
