import json

import pytest
import torch
from helpers import TINY_RUN, run

import evaluate
from featinv import InputError
from featinv.checkpoints import build_model, save_model, slim
from featinv.metrics import relative_l2
from featinv.models.pixel_optimization import PixelOptimization, total_variation

PIXELS = [
    *(
        o
        for o in TINY_RUN
        if not o.startswith(("model.codec", "model.hidden", "sampler", "callbacks.sample"))
    ),
    "model=pixels",
    "model.num_steps=4",
]


@pytest.fixture
def config(tiny_config) -> dict:
    target = "featinv.models.PixelOptimization"
    optimizer = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 8, "momentum": 0.9}
    return {
        "_target_": target,
        "backbone": tiny_config["backbone"],
        "image_size": 32,
        "num_steps": 60,
        "optimizer": optimizer,
    }


@pytest.fixture
def features(config, images) -> torch.Tensor:
    """Features of the three images, (3, 512, 2, 2)."""
    return build_model(config).backbone.features(images).detach()


def test_total_variation_against_a_loop():
    image = torch.rand(1, 3, 4, 5)
    total = 0.0
    for c in range(3):
        for y in range(3):
            for x in range(4):
                here = image[0, c, y, x]
                total += (image[0, c, y, x + 1] - here) ** 2 + (image[0, c, y + 1, x] - here) ** 2
    torch.testing.assert_close(total_variation(image)[0], total / (3 * 3 * 4))


def test_the_energy_is_that_of_the_paper(config, images, features):
    model = build_model({**config, "alpha_weight": 2.0, "tv_weight": 3.0, "tv_range": 0.5})
    seen = model.backbone.features(images)
    for i in range(3):
        error = (seen[i] - features[i]).norm() ** 2 / features[i].norm() ** 2
        alpha = (images[i] ** 6).sum() / images[i].numel()
        variation = total_variation(images[i : i + 1])[0] / 0.5**2
        expected = error + 2 * alpha + 3 * variation
        torch.testing.assert_close(model.energy(images, features)[i], expected)


def test_it_comes_near_the_features(config, features):
    model = build_model({**config, "conditioning": "pooled", "tv_weight": 0.01}).eval()
    asked = model.condition(features)
    start, end = (
        relative_l2(asked, model.condition(model.backbone.features(drawn[:, 0]))).mean()
        for drawn in (model.invert(features, num_steps=1), model.invert(features))
    )
    assert end < 0.6 * start


@pytest.mark.parametrize("image_size", [32, 64])
def test_a_rate_means_the_same_at_every_size(config, image_size):
    """A first step of 1000 / 128^2 times 2 |w|^2 for the mean square of the luminance w x - 1."""
    config |= {"image_size": image_size, "num_steps": 2, "tv_weight": 0, "alpha_weight": 0}
    config["optimizer"]["lr"] = 1000
    target = "featinv.analysis.planted.load_planted"
    config["backbone"] = {"_target_": target, "name": "luminance", "image_size": image_size}
    model = build_model(config).eval()
    drawn = model.invert(torch.ones(1, *model.backbone.feature_shape))[0, 0]
    w = torch.tensor([0.299, 0.587, 0.114])
    step = 2 * 1000 / 128**2 * float(w.square().sum())  # the second one is a hundredth
    assert float((w[:, None, None] * drawn).sum(0).mean()) == pytest.approx(step, rel=0.15)


def test_a_descent_that_runs_away_is_told(config, features):
    config["optimizer"]["lr"] = 1e6
    with pytest.raises(InputError, match="diverges.*expected a lower model.optimizer.lr"):
        build_model(config).invert(features[:1], num_steps=9)


def test_neither_the_batch_nor_the_caller_changes_an_image(config, features):
    model = build_model(config).eval()
    with torch.enable_grad():
        whole = model.invert(features, num_samples=2, num_steps=5)
    part = model.invert(features[1:2], num_samples=2, num_steps=5, indices=[1], batch_size=1)
    torch.testing.assert_close(part, whole[1:2], rtol=0, atol=1e-3)
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert all(p.grad is None for p in model.parameters())


def test_it_is_made_and_evaluated_as_a_featinv_is_without_training(tmp_path):
    output = tmp_path / "run"
    run("train", *PIXELS, f"output={output}")
    assert isinstance(PixelOptimization.load(output), PixelOptimization)
    assert not (output / "curves.png").exists(), "there is nothing to draw"
    other = tmp_path / "evaluated"
    overrides = [f"checkpoint={output}", "data=photos", "data.crops_per_photo=1"]
    overrides += ["precision=32-true", "witnesses=[]"]
    run(
        *("evaluate", *overrides, "sampler.num_steps=3", f"output={other}"),
        task=evaluate.main,
    )
    trained, evaluated = (json.loads((f / "metrics.json").read_text()) for f in (output, other))
    assert trained["sampler"] == {"num_steps": 4}
    assert evaluated["sampler"] == {"num_steps": 3}
    assert "3 gradient steps on the pixels" in (other / "table.md").read_text()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_steps": 0}, "num_steps is 0: expected an integer of at least 1"),
        ({"tv_range": 0}, "model.tv_range is 0, expected above 0"),
        ({"conditioning": "none"}, "Unknown conditioning of PixelOptimization 'none'"),
    ],
)
def test_bad_input(values, sentence, config):
    with pytest.raises(InputError, match=sentence):
        build_model({**config, **values})


def test_a_slim_file_may_have_another_number_of_steps(config, tmp_path):
    save_model(build_model(config), tmp_path / "model.safetensors")
    slim(tmp_path, tmp_path / "slim.safetensors", {"num_steps": 5})
    assert PixelOptimization.load(tmp_path / "slim.safetensors").descent.num_steps == 5


def test_it_has_no_guidance(config, features):
    with pytest.raises(InputError, match="Unknown option of an optimisation of pixels 'eta'"):
        build_model(config).invert(features, eta=0.5)
