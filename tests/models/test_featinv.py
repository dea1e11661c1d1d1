"""Training of FeatInv: its loss, what learns and what stays as it is."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from diffusers import DDPMScheduler
from torch.utils.data import DataLoader

from featinv.checkpoints import build_model, save_model
from featinv.codecs import PatchPCA
from featinv.extractors import pool
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


def logged(model: FeatInv, batch: dict, monkeypatch) -> float:
    """Return the validation loss that a model logs."""
    values = {}
    monkeypatch.setattr(model, "log", lambda name, value, **_: values.update({name: value.item()}))
    model.validation_step(batch, 0)
    model.on_validation_epoch_end()
    return values["val/loss"]


# The loss


def test_the_training_loss_is_the_naive_one(tiny_config, wake):
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
        losses.append((prediction - scheduler.get_velocity(z_0, eps, t)).square().mean())
        dropped += int(drop)
    assert 0 < dropped < 6  # both happen
    torch.testing.assert_close(model.training_step(batch, 0), torch.stack(losses).mean())
    torch.testing.assert_close(model.training_step(make_batch(13), 9), losses[3])  # alone


def test_pooled_conditioning_is_that_of_spatially_constant_features(tiny_config, wake):
    model = wake(build(tiny_config, conditioning="pooled"))
    spatial = wake(build(tiny_config, conditioning="spatial"))
    features = torch.randn(2, 512, 2, 2)
    options = {"num_steps": 2, "guidance_scale": 1.5}
    pooled = model.invert(features, **options)
    torch.testing.assert_close(pooled, spatial.invert(pool(features), **options))
    assert (pooled - spatial.invert(features, **options)).abs().max() > 0.01


def test_without_conditioning_the_unet_is_alone(tiny_config, monkeypatch):
    model = build(tiny_config, conditioning="none")
    assert model.controlnet is None and list(model.trained()) == ["unet"]
    monkeypatch.setattr(model.backbone, "all_features", None)  # never asked
    assert model.training_step(make_batch(0, 1), 0).requires_grad
    calls = []
    model.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    ours = model.invert(torch.randn(2, 512, 2, 2), num_steps=3, guidance_scale=4.0)
    assert calls == [2, 2, 2]  # guidance would be the same pass twice
    assert torch.equal(ours, model.invert(torch.zeros(2, 512, 2, 2), num_steps=3))


# What is trained


@pytest.mark.parametrize("train_unet", [True, False])
def test_every_trained_parameter_learns_and_is_saved_and_no_other(train_unet, tiny_config):
    model = build(tiny_config, cond_drop_prob=0.0, train_unet=train_unet)
    frozen = {key: value.clone() for key, value in model.unet.state_dict().items()}
    optimizer = torch.optim.AdamW(model.trained().parameters(), 1e-2)
    for step in range(5):  # past the zero-initialised convolutions
        optimizer.zero_grad()
        model.training_step(make_batch(*range(4 * step, 4 * step + 4)), 0).backward()
        if step < 4:
            optimizer.step()
    trained = ("controlnet.", "feature_encoder.") + (("unet.",) if train_unet else ())
    for name, parameter in model.named_parameters():
        if name.startswith(trained):
            # Keys' biases shift all of a softmax's logits alike: their gradient is zero, always.
            assert parameter.grad.abs().max() > 1e-7 or name.endswith("to_k.bias"), name
        else:
            assert parameter.grad is None, name
    unchanged = [torch.equal(value, frozen[key]) for key, value in model.unet.state_dict().items()]
    assert all(unchanged) != train_unet
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert {f"{key.split('.')[0]}." for key in checkpoint["state_dict"]} == {*trained}
    model.on_load_checkpoint(checkpoint)  # its own checkpoint is welcome


def test_frozen_modules_stay_in_eval_mode(tiny_config):
    model = build(tiny_config, train_unet=False).train()
    assert model.controlnet.training
    for module in (model.backbone, model.codec, model.unet):
        assert not any(part.training for part in module.modules())
    assert build(tiny_config).train().unet.training


def test_the_schedule_counts_optimiser_steps(tiny_config):
    model = build(tiny_config, train_unet=False, lr_schedule="cosine", warmup_steps=10)
    model._trainer = SimpleNamespace(max_steps=110)
    made = model.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert ours == {id(p) for p in model.trained().parameters()}
    rates = []
    for _ in range(110):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert [rates[i] for i in (0, 5, 10, 60)] == pytest.approx([0, 5e-4, 1e-3, 5e-4], abs=1e-9)


def test_a_model_learns_which_features_go_with_which_colour(tiny_config):
    """Two plain pictures: each must come back from its own features, whatever the noise."""
    colours = torch.tensor([[220, 50, 30], [30, 70, 210]], dtype=torch.uint8)
    pictures = colours[:, :, None, None].expand(2, 3, 32, 32)
    model, steps = build(tiny_config), 90
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


# Validation


def test_the_validation_loss_is_the_mean_over_images_and_the_same_for_every_run(
    tiny_config, wake, monkeypatch
):
    model = wake(build(tiny_config))
    together = logged(model, make_batch(*range(4)), monkeypatch)
    alone = [logged(model, make_batch(i), monkeypatch) for i in range(4)]
    assert together == pytest.approx(sum(alone) / 4, rel=1e-4)
    other = wake(build(tiny_config, seed=5, cond_drop_prob=1.0))
    assert logged(other, make_batch(*range(4)), monkeypatch) == together


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


# What cannot be


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"conditioning": "spatail"}, "did you mean spatial"),
        ({"conditioning": "none", "train_unet": False}, "nothing to train"),
        ({"cond_drop_prob": 1.5}, "cond_drop_prob is 1.5, expected 0 to 1"),
        ({"alignment_weight": -1}, "alignment_weight is -1"),
        ({"target_resize": "bicubik"}, "did you mean bicubic"),
        ({"lr_schedule": "piecewise_constant"}, "Unknown model.lr_schedule"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"image_size": 30}, "image size is 30.*example 32"),
        ({"codec": {"_target_": "featinv.codecs.PatchPCA", "num_components": 5}}, "have 5"),
    ],
)
def test_values_out_of_their_range_are_bad_input(values, sentence, tiny_config):
    with pytest.raises(InputError, match=sentence):
        build(tiny_config, **values)


def test_a_prior_that_was_trained_for_another_diffusion_is_refused(tiny_config, tmp_path):
    path = tmp_path / "prior.safetensors"
    save_model(build(tiny_config, conditioning="none"), path)
    unet = {"_target_": "featinv.checkpoints.load_prior", "path": str(path)}
    tiny_config |= {"unet": unet, "train_unet": False}
    assert build(tiny_config).diffusion.prediction_type == "v_prediction"
    tiny_config["diffusion"]["prediction_type"] = "sample"
    with pytest.raises(InputError, match="prediction_type is sample.*trained with v_prediction"):
        build(tiny_config)


def test_a_checkpoint_with_other_frozen_weights_or_another_architecture_is_refused(tiny_config):
    tiny_config["train_unet"] = False
    model = build(tiny_config)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    for part in ("backbone", "unet", "codec"):
        other = build(tiny_config)
        next(iter(getattr(other, part).state_dict().values())).add_(1e-3)
        with pytest.raises(InputError, match=f"another {part}"):
            other.on_load_checkpoint(checkpoint)
    wider = build(tiny_config, hidden_channels=24)
    with pytest.raises(InputError, match=r"feature_encoder.*has shape \(16.*expected \(24"):
        wider.on_load_checkpoint(checkpoint)


def test_gradients_of_a_fused_optimiser_are_clipped_under_mixed_precision(tiny_config):
    tiny_config["optimizer"]["fused"] = True
    model = build(tiny_config)
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = L.Trainer(
        **options, accelerator="cpu", precision="bf16-mixed", max_steps=1, gradient_clip_val=0.25
    )
    trainer.fit(model, DataLoader([make_batch(0, 1)], batch_size=None))
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.trained().parameters()])
    assert norm.item() == pytest.approx(0.25, rel=1e-3)
