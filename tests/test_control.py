import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel

from featinv.control import FeatureEncoder, FeatureEncoders, make_controlnet


@pytest.fixture
def unet(tiny_config) -> UNet2DConditionModel:
    torch.manual_seed(1)
    options = {key: value for key, value in tiny_config["unet"].items() if key != "_target_"}
    return UNet2DConditionModel(**options).eval()


@pytest.fixture
def controlnet(unet) -> ControlNetModel:
    torch.manual_seed(2)
    return make_controlnet(unet).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    z_t = torch.randn(2, 4, 4, 4, generator=generator)
    encoded = torch.randn(2, 32, 4, 4, generator=generator)
    return z_t, torch.tensor([7, 800]), encoded


def controls_of(controlnet, encoded) -> list[torch.Tensor]:
    z_t, timesteps, _ = inputs()
    down, mid = controlnet(z_t, timesteps, None, controlnet_cond=encoded, return_dict=False)
    return [*down, mid]


def wake(controlnet: ControlNetModel) -> None:
    """Move every zero-initialised convolution away from zero, as training does."""
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


@torch.no_grad()
def test_feature_encoder_starts_at_zero_and_then_follows_the_formula():
    torch.manual_seed(0)
    encoder = FeatureEncoder(6, 5, latent_size=(4, 8), hidden_channels=7)
    features = torch.randn(2, 6, 2, 3)
    assert encoder(features).shape == (2, 5, 4, 8)
    assert not encoder(features).any()

    torch.nn.init.normal_(encoder.conv_out.weight)
    x = F.interpolate(features, size=(4, 8), mode="bilinear", align_corners=False)
    for conv in (encoder.conv_in, encoder.conv_mid):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        x = x * torch.sigmoid(x)
    expected = F.conv2d(x, encoder.conv_out.weight, padding=1)
    torch.testing.assert_close(encoder(features), expected)


@torch.no_grad()
def test_every_layer_has_an_encoder_of_its_own():
    torch.manual_seed(0)
    shapes = {"early": (3, 8, 8), "late": (6, 2, 2)}
    encoders = FeatureEncoders(shapes, out_channels=5, latent_size=(4, 4), hidden_channels=7)
    for encoder in encoders:
        torch.nn.init.normal_(encoder.conv_out.weight)
    features = torch.randn(2, 6, 2, 2)
    torch.testing.assert_close(encoders(features, "late"), encoders[1](features))
    assert encoders(torch.randn(2, 3, 8, 8), "early").shape == (2, 5, 4, 4)


@pytest.mark.parametrize("half", [False, True])
def test_the_encoder_of_a_layer_that_no_image_has_gets_a_gradient_of_zero(half):
    """Several processes wait for every parameter's gradient."""
    shapes = {"early": (3, 8, 8), "late": (6, 2, 2)}
    encoders = FeatureEncoders(shapes, 5, latent_size=(4, 4), hidden_channels=7, fold_features=True)
    features = {layer: torch.randn(2, *shape) for layer, shape in shapes.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        encoded = encoders.of_each(features, torch.tensor([1, 1]))
        torch.testing.assert_close(encoded, encoders(features["late"], "late"))
    encoded.sum().backward()
    assert not any(parameter.grad.any() for parameter in encoders[0].parameters())
    assert encoders[1].conv_out.bias.grad.any()


@torch.no_grad()
def test_folding_keeps_every_position_of_a_larger_map():
    """Each change of a 16 x 16 map is seen at latents of 4 x 4; bilinear shrinking misses most."""

    def changes(fold_features: bool) -> int:
        torch.manual_seed(0)
        encoders = FeatureEncoders({"early": (1, 16, 16)}, 5, (4, 4), 7, fold_features)
        torch.nn.init.normal_(encoders[0].conv_out.weight)
        single = torch.eye(256).view(256, 1, 16, 16)
        moved = encoders(single, "early") - encoders(torch.zeros(1, 1, 16, 16), "early")
        return int((moved.abs().amax(dim=(1, 2, 3)) > 1e-6).sum())

    assert changes(fold_features=True) == 256
    assert changes(fold_features=False) < 128


@torch.no_grad()
def test_controls_are_zero_at_the_start_and_the_unet_does_not_notice_them(unet, controlnet):
    z_t, timesteps, encoded = inputs()
    controls = controls_of(controlnet, encoded)
    assert len(controls) > 2
    assert not any(control.any() for control in controls)
    plain = unet(z_t, timesteps, None).sample
    steered = unet(
        z_t,
        timesteps,
        None,
        down_block_additional_residuals=tuple(controls[:-1]),
        mid_block_additional_residual=controls[-1],
    ).sample
    assert plain.abs().max() > 0.01
    assert torch.equal(plain, steered)


@torch.no_grad()
def test_encoded_features_are_added_once_after_the_first_convolution(controlnet):
    wake(controlnet)
    z_t, timesteps, encoded = inputs()
    seen = []
    controlnet.down_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    controlnet(z_t, timesteps, None, controlnet_cond=encoded)
    expected = controlnet.conv_in(z_t) + encoded
    torch.testing.assert_close(seen[0], expected)
