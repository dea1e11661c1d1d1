import json
import time
from urllib.error import URLError

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from evaluation.naive import NUM_SAMPLES, WITNESS, eight_bits, naive_evaluation
from torch.utils.data import DataLoader
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import alexnet

from featinv import InputError
from featinv.backbones import Backbone
from featinv.checkpoints import build_model
from featinv.evaluation import evaluator as evaluator_module
from featinv.evaluation import witnesses
from featinv.evaluation.evaluator import ABOUT, Evaluator
from featinv.evaluation.report import caption
from featinv.evaluation.set_metrics import frechet_distance, kernel_distance
from featinv.evaluation.tables import format_interval
from featinv.metrics import bootstrap_interval
from featinv.utils.pixels import from_uint8, resize

LABELS = (0, 1, 1)
INVERTED = ("spatial_cosine", "pooled_cosine", "relative_l2", "top1_agreement", "top5_agreement")


def pictures(number: int = 3, size: int = 64) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(number, 3, 6, 6, generator=generator)
    images = F.interpolate(coarse, (size, size), mode="bicubic").sigmoid().mul(255).byte()
    return [
        {"image": images[i], "index": 10 * i, "key": f"p{i}", "label": LABELS[i % 3]}
        for i in range(number)
    ]


@pytest.fixture
def model(awake_model):
    """A model that uses its condition, and a classifier that does not always say the same."""
    head = awake_model.backbone.model.fc
    head.weight.data = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3))
    return awake_model.eval()


@pytest.fixture(autouse=True)
def witness(monkeypatch) -> Backbone:
    """A small classifier in place of those that take seconds."""
    backbone = Backbone(WITNESS, weights="random", image_size=32, num_classes=7)
    head = backbone.model.classifier
    head.weight.data = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(witnesses, "extractor_backbone", lambda name, kind: backbone)
    return backbone


def evaluated(model, items=None, batch_size: int = 2, **options) -> Evaluator:
    options = {"num_samples": NUM_SAMPLES, "seed": 5, "precision": "32-true"} | options
    evaluation = Evaluator(model, **{"witnesses": [WITNESS]} | options)
    evaluation.run(DataLoader(items or pictures(), batch_size=batch_size))
    return evaluation


def scores(evaluation: Evaluator) -> pd.DataFrame:
    return evaluation.per_image().drop(columns=ABOUT)


def test_every_number_is_that_of_a_naive_loop(model, witness):
    expected = naive_evaluation(model, witness, pictures())
    found = scores(evaluated(model))
    assert set(found) == {f"{row}/{m}" for row, values in expected.items() for m in values[0]}
    for column in found:
        row, metric = column.split("/")
        wanted = [values[metric] for values in expected[row]]
        assert found[column].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5), column
    # or the test could not tell the rows apart
    assert len({tuple(found[f"{row}/spatial_cosine"]) for row in expected}) == 6
    for agreement in ("top1_agreement", f"{WITNESS}_top1"):
        rows = ("codec", "reconstruction", "floor")
        assert len({tuple(found[f"{row}/{agreement}"]) for row in rows}) > 1


def test_no_number_depends_on_the_batch_size(model):
    items = pictures(5)
    reference = scores(evaluated(model, items, batch_size=2))
    drawn_singly = Evaluator(model, NUM_SAMPLES, 5, 1, precision="32-true", witnesses=[WITNESS])
    drawn_singly.run(DataLoader(items, batch_size=5))
    close = {"rtol": 1e-3, "atol": 1e-3, "check_like": True}  # an 8-bit value may round otherwise
    pd.testing.assert_frame_equal(scores(drawn_singly), reference, **close)


def test_intervals_are_over_photographs(model):
    items = [item | {"photograph": f"photo{i // 2}"} for i, item in enumerate(pictures(6))]
    evaluation = evaluated(model, items)
    values = evaluation.per_image()
    assert values["photograph"].tolist() == [f"photo{i // 2}" for i in range(6)]
    cell = evaluation.metrics()["rows"]["reconstruction"]["spatial_cosine"]
    cosine = values["reconstruction/spatial_cosine"]
    low, high = bootstrap_interval(cosine, photographs=values["photograph"])
    assert cell == pytest.approx({"mean": cosine.mean(), "low": low, "high": high})
    assert (low, high) != pytest.approx(bootstrap_interval(cosine))
    assert "6 images of 3 photographs" in caption(evaluation.metrics())
    alone = evaluated(model, [item | {"label": 3} for item in pictures()])
    assert alone.metrics()["num_photographs"] == 3 == alone.metrics()["same_class"]
    assert "3 of the images are compared with another image" in caption(alone.metrics())


def test_one_image_has_no_other(model, tmp_path):
    evaluation = evaluated(model, pictures(1))
    rows = evaluation.metrics()["rows"]
    assert list(rows) == ["ceiling", "codec", "reconstruction", "best"]
    cosine = rows["reconstruction"]["spatial_cosine"]
    assert cosine["low"] == cosine["mean"] == cosine["high"]
    evaluation.save(tmp_path, "python evaluate.py")
    assert set(json.loads((tmp_path / "metrics.json").read_text())["rows"]) == set(rows)


def test_a_perfect_reconstruction_reaches_the_ceiling(tiny_config, monkeypatch):
    """Images of the model's own size: the ceiling is 1, and so is their own copy."""
    model = build_model(tiny_config).eval()
    items = pictures(size=model.image_size)
    originals = {item["index"]: from_uint8(item["image"]) for item in items}

    def copy(features, num_samples, *args, indices, **options):
        return torch.stack([originals[i].expand(num_samples, -1, -1, -1) for i in indices])

    monkeypatch.setattr(model, "invert", copy)
    rows = evaluated(model, items).metrics()["rows"]
    assert rows["reconstruction"]["psnr"]["mean"] == 100  # not infinite
    assert rows["reconstruction"]["normalised_cosine"]["mean"] == pytest.approx(1, abs=1e-5)
    for name in ("spatial_cosine", "top1_agreement"):
        assert rows["shuffled"][name] == pytest.approx(rows["floor"][name], abs=1e-5)


def test_an_encoder_without_classes_has_no_agreement(tiny_config):
    config = tiny_config | {"backbone": tiny_config["backbone"] | {"num_classes": 0}}
    rows = evaluated(build_model(config).eval()).metrics()["rows"]
    assert "spatial_cosine" in rows["reconstruction"]
    assert not any(name.startswith("top") for scores in rows.values() for name in scores)


class Colours:
    """Compares images by their mean red and green."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :2].mean((2, 3))


def test_sets_are_compared_by_witnesses_and_extractors(model, witness, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator_module, "Extractor", Colours)
    monkeypatch.setattr("featinv.evaluation.set_metrics.IMAGES_PER_FEATURE", 2)
    assert evaluated(model, pictures(3)).metrics()["sets"] == {}
    items = pictures(5)
    evaluation = evaluated(model, items, extractors=["lite0"])
    evaluation.save(tmp_path, "python evaluate.py")
    saved = json.loads((tmp_path / "metrics.json").read_text())["sets"]
    images = torch.stack([from_uint8(item["image"]) for item in items])
    drawn = model.invert(
        model.backbone.features(images), 2, seed=5, indices=[item["index"] for item in items]
    )
    first = eight_bits(drawn[:, 0])
    expected = frechet_distance(Colours("")(images), Colours("")(first))
    assert saved["lite0"]["reconstruction"]["fd"] == pytest.approx(expected, rel=1e-3)
    assert saved["lite0"]["ceiling"]["fd"] < expected and saved["lite0"]["ceiling"]["recall"] > 0.5
    real, fake = (witness.features(batch).mean((2, 3)) for batch in (images, first))
    kid = kernel_distance(real, fake)
    assert saved[WITNESS]["reconstruction"]["kid"] == pytest.approx(kid, rel=1e-3)
    assert "fd" not in saved[WITNESS]["reconstruction"]  # 64 features
    assert f" {saved[WITNESS]['best']['kid']:.3g} |" in (tmp_path / "table.md").read_text()


LPIPS_NETWORK = "torchmetrics.functional.image.lpips._get_tv_model_features"


def test_lpips_is_that_of_torchmetrics(model, monkeypatch):
    monkeypatch.setattr("featinv.metrics.check_download", lambda url: None)
    torch.manual_seed(0)
    network = alexnet(weights=None).features  # its weights cannot be had everywhere
    monkeypatch.setattr(LPIPS_NETWORK, lambda name, pretrained: network)
    values = scores(evaluated(model, lpips=True))
    small = [resize(from_uint8(item["image"])[None], model.image_size) for item in pictures()]
    lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    for found, image in zip(values["codec/lpips"], small, strict=True):
        coded = model.codec.decode(model.codec.encode(image))
        expected = float(lpips(eight_bits(image), eight_bits(coded)))
        assert found == pytest.approx(expected, rel=1e-3)
    assert (values["reconstruction/lpips"] > 0).all() and "ceiling/lpips" not in values

    def refuse(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(LPIPS_NETWORK, refuse)
    with pytest.raises(InputError, match="weights of LPIPS.*no route to host.*lpips=false"):
        Evaluator(model, lpips=True, witnesses=[])


def test_seed_sampler_and_precision_change_nothing_but_the_samples(model):
    reference = scores(evaluated(model))
    for options in ({"seed": 6}, {"sampler": {"num_steps": 2}}, {"precision": "bf16-mixed"}):
        found = scores(evaluated(model, **options))
        for name in reference.filter(like="cosine"):
            same = reference[name].equals(found[name])
            assert same != name.startswith(("reconstruction", "best", "shuffled")), name


def test_the_clock_waits_for_the_device(model, monkeypatch):
    """On a device that works asynchronously."""
    monkeypatch.setattr("featinv.utils.devices.synchronize", lambda device: time.sleep(0.2))
    monkeypatch.setattr(
        model,
        "invert",
        lambda features, samples, **_: torch.zeros(len(features), samples, 3, 32, 32),
    )
    metrics = evaluated(model).metrics()  # two batches, six samples
    assert 6 * metrics["seconds_per_reconstruction"] >= 2 * 0.2


# Output


def test_the_files(model, tmp_path):
    evaluation = evaluated(model, num_pictures=2)
    evaluation.save(tmp_path, "python evaluate.py", checkpoint="RUN")
    assert (tmp_path / "reconstructions.png").is_file()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == evaluation.metrics() | {"checkpoint": "RUN", "command": "python evaluate.py"}
    assert (metrics["num_images"], metrics["num_samples"], metrics["seed"]) == (3, 2, 5)
    assert metrics["sampler"]["scheduler"] == "dpm_solver"
    written = pd.read_csv(tmp_path / "per_image.csv", index_col="index")
    assert (written.index.tolist(), written["key"].tolist()) == ([0, 10, 20], ["p0", "p1", "p2"])
    pd.testing.assert_frame_equal(written, evaluation.per_image(), atol=1e-6, check_names=False)
    table = (tmp_path / "table.md").read_text()
    cell = metrics["rows"]["reconstruction"][f"{WITNESS}_cosine"]
    assert f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" in table
    assert "3 images, 2 samples each, seed 5; dpm_solver, 4 steps, guidance 1.5" in table


def test_the_figure_shows_the_first_images_and_how_calibrated_their_spread_is(model):
    evaluation = evaluated(model, num_pictures=2)
    found = scores(evaluation)
    for (_, original, samples, *_), item in zip(evaluation._pictures, pictures(), strict=False):
        torch.testing.assert_close(original, item["image"])
        assert samples.shape == (2, 3, 32, 32)
    cell = evaluation.metrics()["rows"]["reconstruction"]["calibration_ratio"]
    between, to_original = (
        found[f"reconstruction/{name}"] for name in ("between_samples", "to_original")
    )
    assert cell["mean"] == pytest.approx(between.mean() / to_original.mean())
    assert cell["low"] < cell["mean"] < cell["high"]
    axes = evaluation.figure().axes
    texts = {" ".join(text.get_text().split()) for ax in axes for text in ax.texts}
    (head,) = [text for text in texts if text.startswith("spread, up to")]
    assert head.endswith(f"calibration {format_interval(**cell, digits=2)}")
    assert {"p0", "p1"} < texts and "p2" not in texts
    for i in (0, 10):
        ratio = f"calibration {between[i] / to_original[i]:.2f}"
        assert any(text.startswith("mean") and text.endswith(ratio) for text in texts)
        assert f"cosine {float(evaluation._pictures[i // 10][3][1]):.3f}" in texts
    single = evaluated(model, num_samples=1).metrics()["rows"]["reconstruction"]
    assert "diversity" not in single and "calibration_ratio" not in single


def test_scores_so_far_survive_broken_data(model):
    def broken():
        yield from DataLoader(pictures()[:2], batch_size=1)
        raise InputError("The data are broken.")

    evaluation = Evaluator(model, NUM_SAMPLES, seed=5, precision="32-true", witnesses=[WITNESS])
    with pytest.raises(InputError, match="broken"):
        evaluation.run(broken())
    expected = scores(evaluated(model))[:2]
    pd.testing.assert_frame_equal(scores(evaluation), expected, atol=1e-5, check_like=True)


def test_bad_input(model, tiny_config):
    for options, sentence in (
        ({"num_samples": 0}, "num_samples is 0: expected an integer"),
        ({"precision": "16"}, "Unknown precision '16': choose from auto"),
        ({"sampler": {"num_steps": 0}}, "num_steps is 0"),
    ):
        with pytest.raises(InputError, match=sentence):
            Evaluator(model, **options)
    with pytest.raises(InputError, match="There is no image to evaluate"):
        Evaluator(model, witnesses=[]).run([])
    with pytest.raises(InputError, match="is a prior"):
        Evaluator(build_model({**tiny_config, "conditioning": "none"}))
