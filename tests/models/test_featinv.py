import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from featinv.backbones import pool
from featinv.checkpoints import build_model, save_model
from featinv.codecs import PatchPCA
from featinv.models.featinv import FeatInv
from featinv.utils.errors import InputError
from featinv.utils.pixels import from_uint8, resize
from featinv.utils.seeding import Draw, make_generator

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")  # no trainer


def build(config: dict, **values) -> FeatInv:
    torch.manual_seed(0)
    return build_model({**config, **values})


def make_batch(*index: int) -> dict:
    """A batch whose images depend on their numbers only, as those of the data modules do."""
    images = [
        torch.randint(0, 256, (3, 40, 40), generator=make_generator(i), dtype=torch.uint8)
        for i in index
    ]
    return {"image": torch.stack(images), "index": torch.tensor(index)}


def condition_of(model: FeatInv, batch: dict, monkeypatch) -> Tensor:
    """Return what the feature encoder is given in a training step."""
    seen = []
    model.feature_encoder[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    monkeypatch.setattr(model, "predict", lambda z_t, *_: torch.zeros_like(z_t))
    model.training_step(batch, 0)
    return seen[0]


def logged(model: FeatInv, batch: dict, monkeypatch) -> float:
    """Return the validation loss that a model logs."""
    values = {}
    monkeypatch.setattr(model, "log", lambda name, value, **_: values.update({name: value.item()}))
    model.validation_step(batch, 0)
    model.on_validation_epoch_end()
    assert set(values) == {"val/loss"}
    return values["val/loss"]


def train(model: FeatInv, steps: int) -> None:
    """Train a few steps on fresh noise."""
    optimizer = torch.optim.AdamW(model.trained().parameters(), 1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model.training_step(make_batch(*range(4 * step, 4 * step + 4)), 0).backward()
        optimizer.step()


# Training


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_training_loss_is_the_naive_one(prediction_type, tiny_config, wake):
    tiny_config["diffusion"]["prediction_type"] = prediction_type
    model = wake(build(tiny_config, seed=7, cond_drop_prob=0.5))
    batch = make_batch(10, 11, 12, 13, 14, 15)
    scheduler = DDPMScheduler(**model.diffusion.scheduler_config)

    losses, dropped = [], 0
    for image, number in zip(batch["image"], batch["index"].tolist(), strict=True):
        generator = make_generator(7, Draw.TRAINING, number)
        uniform, drop = torch.rand(2, generator=generator)
        t = (uniform.double() * 1000).long()[None]
        drop = drop < 0.5
        eps = torch.randn(1, 4, 4, 4, generator=generator)
        image = image[None] / 255 * 2 - 1
        features = model.backbone.features(image) * ~drop
        z_0 = PatchPCA(4).encode(resize(image, 32))
        z_t = scheduler.add_noise(z_0, eps, t)
        encoded = model.feature_encoder[0](features)
        controls = model.controlnet(z_t, t, None, controlnet_cond=encoded)
        prediction = model.unet(
            z_t,
            t,
            None,
            down_block_additional_residuals=controls.down_block_res_samples,
            mid_block_additional_residual=controls.mid_block_res_sample,
        ).sample
        target = {
            "epsilon": eps,
            "sample": z_0,
            "v_prediction": scheduler.get_velocity(z_0, eps, t),
        }[prediction_type]
        losses.append((prediction - target).square().mean())
        dropped += int(drop)
    assert 0 < dropped < 6  # both happen
    torch.testing.assert_close(model.training_step(batch, 0), torch.stack(losses).mean())


def test_the_training_loss_depends_on_numbers_and_seed_but_not_on_the_batch(tiny_config, wake):
    model = wake(build(tiny_config, seed=1))
    together = model.training_step(make_batch(4, 5, 6), 0)
    alone = [model.training_step(make_batch(i), 9) for i in (6, 4, 5)]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    other = wake(build(tiny_config, seed=2)).training_step(make_batch(4, 5, 6), 0)
    assert abs(other - together) > 1e-4


def test_the_share_of_dropped_features_is_the_one_asked_for(tiny_config, monkeypatch):
    config = {**tiny_config, "cond_drop_prob": 0.3}
    features = condition_of(build(config), make_batch(*range(400)), monkeypatch)
    dropped = ~features.flatten(1).any(1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=3 * math.sqrt(0.21 / 400))
    again = condition_of(build(config), make_batch(*reversed(range(50))), monkeypatch)
    assert torch.equal(~again.flatten(1).any(1), dropped[:50].flip(0))


def test_features_that_are_kept_are_the_backbones_own(tiny_config, monkeypatch):
    model = build(tiny_config, cond_drop_prob=0.0)
    batch = make_batch(*range(8))
    features = condition_of(model, batch, monkeypatch)
    torch.testing.assert_close(features, model.backbone.features(from_uint8(batch["image"])))
    never = condition_of(build(tiny_config, cond_drop_prob=1.0), batch, monkeypatch)
    assert never.shape == features.shape and not never.any()


def test_the_backbone_sees_the_whole_picture_not_the_small_target(tiny_config, monkeypatch):
    """Features come from the images as they are, at most resized once by the backbone itself."""
    model = build(tiny_config, cond_drop_prob=0.0)
    seen = []
    features = model.backbone.all_features
    monkeypatch.setattr(
        model.backbone, "all_features", lambda images: seen.append(images.shape) or features(images)
    )
    model.training_step(make_batch(0), 0)
    assert seen == [(1, 3, 40, 40)]


def test_pooled_conditioning_is_that_of_spatially_constant_features(tiny_config, wake):
    model = wake(build(tiny_config, conditioning="pooled"))
    spatial = wake(build(tiny_config, conditioning="spatial"))
    features = torch.randn(2, 512, 2, 2)
    options = {"num_steps": 2, "guidance_scale": 1.5}
    pooled = model.invert(features, **options)
    torch.testing.assert_close(pooled, spatial.invert(pool(features), **options))
    torch.testing.assert_close(pooled, model.invert(features.flip(2), **options))
    assert (pooled - spatial.invert(features, **options)).abs().max() > 0.01


def test_pooled_training_drops_positions_too(tiny_config, monkeypatch):
    model = build(tiny_config, conditioning="pooled", cond_drop_prob=0.0)
    batch = make_batch(0, 1)
    expected = model.backbone.features(from_uint8(batch["image"])).mean((2, 3))
    condition = condition_of(model, batch, monkeypatch)
    assert condition.shape == (2, 512, 2, 2)
    for y in range(2):
        for x in range(2):
            torch.testing.assert_close(condition[:, :, y, x], expected)


def test_without_conditioning_the_unet_is_alone(tiny_config, monkeypatch):
    model = build(tiny_config, conditioning="none")
    assert model.controlnet is None
    assert list(model.trained()) == ["unet"]
    monkeypatch.setattr(model.backbone, "all_features", None)  # never asked
    assert model.training_step(make_batch(0, 1), 0).requires_grad
    calls = []
    model.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    ours = model.invert(torch.randn(2, 512, 2, 2), num_steps=3, guidance_scale=4.0)
    assert calls == [2, 2, 2]  # guidance would be the same pass twice
    assert torch.equal(ours, model.invert(torch.zeros(2, 512, 2, 2), num_steps=3))


# What is trained


def gradients(model: FeatInv, batch: dict) -> dict[str, float | None]:
    """Return the largest gradient of each parameter after one step, None where there is none."""
    model.zero_grad(set_to_none=True)
    model.training_step(batch, 0).backward()
    return {
        name: None if p.grad is None else p.grad.abs().max().item()
        for name, p in model.named_parameters()
    }


def idle(name: str) -> bool:
    """Keys' biases shift all of a softmax's logits alike: their gradient is zero, always."""
    return name.endswith("to_k.bias")


def test_every_trained_parameter_learns_and_no_other(tiny_config):
    model = build(tiny_config, cond_drop_prob=0.0)
    train(model, steps=4)  # past the zero-initialised convolutions
    for name, gradient in gradients(model, make_batch(*range(8))).items():
        if name.startswith(("unet.", "controlnet.", "feature_encoder.")):
            assert gradient is not None and math.isfinite(gradient), name
            assert gradient > 1e-7 or idle(name), name
        else:
            assert gradient is None, name


def test_a_frozen_unet_passes_gradients_on_but_has_none(tiny_config):
    model = build(tiny_config, cond_drop_prob=0.0, train_unet=False)
    frozen = {key: value.clone() for key, value in model.unet.state_dict().items()}
    assert list(model.trained()) == ["controlnet", "feature_encoder"]
    train(model, steps=4)
    for name, gradient in gradients(model, make_batch(*range(8))).items():
        if name.startswith(("controlnet.", "feature_encoder.")):
            assert gradient is not None and math.isfinite(gradient), name
            assert gradient > 1e-7 or idle(name), name
        else:
            assert gradient is None, name
    for key, value in model.unet.state_dict().items():
        assert torch.equal(value, frozen[key]), key


def test_gradients_are_those_of_finite_differences(tiny_config, wake):
    model = wake(build(tiny_config)).double()
    batch = make_batch(0, 1)
    images = from_uint8(batch["image"]).double()
    weight = model.feature_encoder[0].conv_in.weight
    features = model.backbone.features
    model.backbone.preprocess = lambda images: images  # which works in single precision
    model.backbone.features = lambda images: features(images.double())

    def loss() -> Tensor:
        generators = [make_generator(i) for i in range(2)]
        timesteps, keep = torch.tensor([300, 700]), torch.tensor([True, True])
        return model.losses(images, timesteps, keep, generators).mean()

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn_like(weight)
    step = 1e-3
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * step * direction
            ends.append(loss())
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(
        (gradient * direction).sum().float(), slope.float(), rtol=0.02, atol=0
    )


def test_frozen_modules_stay_in_eval_mode(tiny_config):
    model = build(tiny_config, train_unet=False).train()
    assert model.controlnet.training
    for module in (model.backbone, model.codec, model.unet):
        assert not any(part.training for part in module.modules())
    model = build(tiny_config).train()
    assert model.unet.training and not model.backbone.model.training
    assert not model.eval().unet.training


def test_a_new_model_draws_as_if_there_were_no_features(tiny_model):
    """The ControlNet starts at zero: training starts from the unconditional model."""
    z_t, timesteps = torch.randn(2, 4, 4, 4), torch.tensor([1, 500])
    features = torch.randn(2, 512, 2, 2)
    plain = tiny_model.unet(z_t, timesteps, None).sample
    assert torch.equal(tiny_model.denoise(z_t, timesteps, features=features), plain)


def test_the_optimiser_has_the_trained_parameters_and_the_schedule_its_steps(tiny_config):
    model = build(tiny_config, train_unet=False, lr_schedule="cosine", warmup_steps=10)
    model._trainer = SimpleNamespace(max_steps=110)
    made = model.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    assert isinstance(optimizer, torch.optim.AdamW)
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [*model.controlnet.parameters(), *model.feature_encoder.parameters()]
    assert ours == {id(p) for p in trained}
    for step in range(110):
        decay = 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        expected = 1e-3 * (step / 10 if step < 10 else decay)
        assert schedule.get_last_lr()[0] == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        schedule.step()


# Validation


def test_the_validation_loss_is_the_same_for_every_run(tiny_config, wake, monkeypatch):
    batch = make_batch(0, 1, 2)
    first, second = (
        logged(wake(build(tiny_config, seed=seed, cond_drop_prob=drop)), batch, monkeypatch)
        for seed, drop in ((0, 0.0), (5, 1.0))
    )
    assert first == second


def test_the_validation_loss_is_the_mean_over_images(tiny_config, wake, monkeypatch):
    model = wake(build(tiny_config))
    together = logged(model, make_batch(*range(6)), monkeypatch)
    alone = [logged(model, make_batch(i), monkeypatch) for i in range(6)]
    assert together == pytest.approx(sum(alone) / 6, rel=1e-4)


def test_validation_covers_the_timesteps_evenly(tiny_model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        tiny_model, "losses", lambda images, timesteps, *_: seen.append(timesteps) or torch.zeros(1)
    )
    logged(tiny_model, make_batch(*range(50)), monkeypatch)
    timesteps = seen[0].sort().values
    assert timesteps.min() >= 0 and timesteps.max() < 1000
    gaps = torch.cat([timesteps[:1], timesteps, torch.tensor([1000])]).diff()
    assert gaps.max() <= 2.5 * 1000 / 50


# Configuration and checkpoints


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"conditioning": "spatail"}, "did you mean spatial"),
        ({"conditioning": "none", "train_unet": False}, "nothing to train"),
        ({"cond_drop_prob": 1.5}, "cond_drop_prob is 1.5, expected 0 to 1"),
        ({"lr_schedule": "cosin"}, "did you mean cosine"),
        ({"lr_schedule": "piecewise_constant"}, "Unknown model.lr_schedule"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"image_size": 30}, "image size is 30.*example 32"),
    ],
)
def test_values_out_of_their_range_are_bad_input(values, sentence, tiny_config):
    with pytest.raises(InputError, match=sentence):
        build(tiny_config, **values)


def test_a_prior_that_was_trained_for_another_diffusion_is_refused(tiny_config, tmp_path):
    prior = build(tiny_config, conditioning="none")
    save_model(prior, tmp_path / "prior.safetensors")
    tiny_config["unet"] = {
        "_target_": "featinv.checkpoints.load_prior",
        "path": str(tmp_path / "prior.safetensors"),
    }
    assert build(tiny_config, train_unet=False).diffusion.prediction_type == "v_prediction"
    tiny_config["diffusion"]["prediction_type"] = "sample"
    with pytest.raises(InputError, match="prediction_type is sample.*trained with v_prediction"):
        build(tiny_config, train_unet=False)


def test_a_sampler_that_does_not_fit_the_diffusion_is_bad_input_at_once(tiny_config):
    tiny_config["diffusion"]["num_train_timesteps"] = 10
    tiny_config["sampler"]["num_steps"] = 20
    with pytest.raises(InputError, match="over 10 timesteps"):
        build(tiny_config)


@pytest.mark.parametrize(
    ("train_unet", "modules"),
    [
        (True, {"unet", "controlnet", "feature_encoder"}),
        (False, {"controlnet", "feature_encoder"}),
    ],
)
def test_a_checkpoint_holds_what_is_trained(train_unet, modules, tiny_config):
    model = build(tiny_config, train_unet=train_unet)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == modules
    assert checkpoint["state_dict"].keys() == model.trained().state_dict().keys()
    assert checkpoint["featinv"]["config"] == model.config
    model.on_load_checkpoint(checkpoint)  # its own checkpoint is welcome


def test_a_checkpoint_with_another_frozen_module_is_refused(tiny_config, tmp_path):
    model = build(tiny_config, train_unet=False)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)

    other = build(tiny_config, train_unet=False)
    next(other.backbone.parameters()).data += 1e-3
    with pytest.raises(InputError, match="another backbone.*resnet10t"):
        other.on_load_checkpoint(checkpoint)

    other = build(tiny_config, train_unet=False)
    next(other.unet.parameters()).data += 1e-3
    with pytest.raises(InputError, match="another unet"):
        other.on_load_checkpoint(checkpoint)

    path = tmp_path / "basis.safetensors"
    PatchPCA.save(PatchPCA.fit(torch.randn(20, 3, 32, 32)), path)
    codec = {**tiny_config["codec"], "basis": str(path)}
    with pytest.raises(InputError, match="another codec"):
        build(tiny_config, train_unet=False, codec=codec).on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_another_architecture_is_refused(tiny_config):
    model = build(tiny_config)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    wider = build(tiny_config, hidden_channels=24)
    with pytest.raises(InputError, match=r"feature_encoder.*has shape \(16.*expected \(24"):
        wider.on_load_checkpoint(checkpoint)
    unconditional = build(tiny_config, conditioning="none")
    with pytest.raises(InputError, match="does not fit the model"):
        unconditional.on_load_checkpoint(checkpoint)


# All of it


def test_a_model_learns_which_features_go_with_which_colour(tiny_config):
    """Two plain pictures: each must come back from its own features, whatever the noise."""
    colours = torch.tensor([[220, 50, 30], [30, 70, 210]], dtype=torch.uint8)
    pictures = colours[:, :, None, None].expand(2, 3, 32, 32)
    model, steps = build(tiny_config), 200
    optimizer = torch.optim.AdamW(model.trained().parameters(), 8e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for step in range(steps):
        index = torch.arange(8 * step, 8 * step + 8)
        optimizer.zero_grad()
        model.training_step({"image": pictures[index % 2], "index": index}, 0).backward()
        optimizer.step()
        schedule.step()

    images = from_uint8(pictures)
    features = model.eval().backbone.features(images)
    drawn = model.invert(features, num_samples=2, num_steps=10).mean((3, 4))  # (2, 2, 3)
    expected = model.codec.decode(model.codec.encode(images)).mean((2, 3))  # (2, 3)
    for i in range(2):
        distances = (drawn[i][:, None] - expected).norm(dim=2)  # sample by colour
        assert distances[:, i].max() < 0.6
        assert distances[:, 1 - i].min() > 1.2


# Clipping


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_of_a_fused_optimiser_are_clipped(tiny_model, precision):
    parameters = list(tiny_model.trained().parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    tiny_model.trainer = L.Trainer(precision=precision, accelerator="cpu", logger=False)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    tiny_model.configure_gradient_clipping(optimizer, 2.0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    assert norm.item() == pytest.approx(2.0, rel=1e-3)


def test_float16_cannot_clip_the_gradients_of_a_fused_optimiser(tiny_model):
    optimizer = torch.optim.AdamW(tiny_model.trained().parameters(), fused=True)
    tiny_model.trainer = type("Trainer", (), {"precision": "16-mixed"})
    with pytest.raises(InputError, match="trainer.precision=16-mixed cannot clip the gradients of"):
        tiny_model.configure_gradient_clipping(optimizer, 1.0)
    tiny_model.configure_gradient_clipping(optimizer, None)
