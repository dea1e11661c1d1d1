import json

import pytest
import torch
from helpers import TINY

import benchmark
import workloads
from featinv import FeatInv
from featinv.utils.errors import InputError

# The benchmark has no trainer, callbacks or evaluation.
TINY_BENCHMARK = [
    o for o in TINY if not o.startswith(("trainer", "callbacks", "evaluation", "sampler"))
]


@pytest.fixture
def config(tiny_config) -> dict:
    return {
        "model": tiny_config,
        "data": {"image_size": 64},
        "device": "cpu",
        "compile": False,
        "repeats": 2,
        "sampling_batch_size": 2,
    }


def test_the_originals_way_computes_the_same_and_more(config, images):
    """Same loss and same gradients of what is trained; others, that nobody uses, besides."""
    config["model"]["train_unet"] = False
    losses, gradients = [], []
    for original in (False, True):
        torch.manual_seed(0)
        model = workloads.Workload(config, "32-true", original).model
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        keep = torch.ones(3, dtype=torch.bool)
        loss = model.losses(images, torch.tensor([5, 500, 900]), keep, generators).mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(name.startswith(("controlnet.", "feature_encoder.")) for name in gradients[0])
    wasted = gradients[1].keys() - gradients[0].keys()
    assert wasted and all(name.startswith(("unet.up_blocks.", "unet.conv_")) for name in wasted)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


def test_two_passes_of_guidance_are_the_one(awake_model, images, monkeypatch):
    features = awake_model.backbone.features(images)
    expected = awake_model.eval().invert(features, num_steps=3)
    monkeypatch.setattr(
        "featinv.models.featinv.classifier_free_guidance", workloads.unbatched_guidance
    )
    drawn = awake_model.invert(features, num_steps=3)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "bfloat16")]
)
def test_an_inversion_runs_in_its_precision(precision, dtype, config, monkeypatch):
    predict, dtypes = FeatInv.predict, set()

    def noting(*args):
        prediction = predict(*args)
        dtypes.add(prediction.dtype)
        return prediction

    monkeypatch.setattr(FeatInv, "predict", noting)
    workloads.measure_sampling(config, precision, False, "ddim", 1)
    assert dtypes == {getattr(torch, dtype)}


def test_the_benchmark_writes_its_page(experiment, tmp_path, capsys):
    """One run in this process, in which a row lacks memory."""
    overrides = ["repeats=1", "original_steps=2", "sampling={ddim: [2], dpm_solver: [1]}"]

    def measure(function, config: dict, *args) -> dict:
        if function is workloads.measure_training and args[0] == "bf16-mixed":
            raise InputError("It ended with exit code -9.")
        return function(config, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "in_process", measure)
        experiment("benchmark", *TINY_BENCHMARK, *overrides, "workers=[0]", output=tmp_path)
    page = (tmp_path / "benchmark.md").read_text()
    assert page in capsys.readouterr().out
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["way"] for row in results["measure_training"]] == ["original", "featinv"]
    assert "Left out: It ended with exit code -9." in (tmp_path / "benchmark.log").read_text()
    for row in results["measure_training"]:
        seconds = [row["seconds"][name] for name in benchmark.PHASES]
        assert min(seconds) > 0 and sum(seconds[1:]) < seconds[0], "phases add up"
        assert row["cpu_seconds"] > 0 and row["tflops"] > 0 and 0.1 < row["peak_gb"] < 20
        assert f" {seconds[0]:.3f} " in page
    assert len(results["measure_sampling"]) == 1 + 2 * 2
    (checkpoint,) = results["measure_checkpoint"]
    trained = sum(checkpoint["parameters"][n] for n in ("unet", "controlnet", "feature_encoder"))
    assert 4 * trained < checkpoint["bytes"] < 4 * trained + 50_000
