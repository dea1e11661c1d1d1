import json
import time
from urllib.error import URLError

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import alexnet

from featinv import InputError
from featinv.backbones import Backbone
from featinv.checkpoints import build_model
from featinv.evaluation import evaluator as evaluator_module
from featinv.evaluation import witnesses
from featinv.evaluation.evaluator import ABOUT, Evaluator
from featinv.evaluation.set_metrics import frechet_distance, kernel_distance
from featinv.metrics import bootstrap_interval
from featinv.utils.pixels import from_uint8, resize
from featinv.utils.precision import resolve_precision

NUM_SAMPLES = 2
LABELS = (0, 1, 1)
OTHER = (1, 0, 0)  # the only one of another class that each can have
WITNESS = "test_efficientnet"
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


# Written out, with one image and one position at a time


def eight_bits(image: torch.Tensor) -> torch.Tensor:
    return ((image.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def naive_scores(backbone, original: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Compare two images (3, H, W) in [-1, 1]."""
    a, b = (backbone.features(image[None])[0] for image in (original, other))
    logits_a, logits_b = (backbone.classify(image[None])[0] for image in (original, other))
    height, width = a.shape[1:]
    best, ranking = int(logits_a.argmax()), logits_b.argsort(descending=True).tolist()
    return {
        "spatial_cosine": sum(
            cosine(a[:, y, x], b[:, y, x]) for y in range(height) for x in range(width)
        )
        / (height * width),
        "pooled_cosine": cosine(a.mean((1, 2)), b.mean((1, 2))),
        "relative_l2": float((a - b).square().sum().sqrt() / a.square().sum().sqrt()),
        "top1_agreement": float(best == ranking[0]),
        "top5_agreement": float(best in ranking[:5]),
    }


def naive_pixels(small: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    a, b = ((eight_bits(image).double() + 1) / 2 for image in (small, other))
    return {
        "psnr": float(10 * (1 / (a - b).square().mean()).log10()),
        "contrast": float(b.std() / a.std()),
        "saturated": float(((b * 255).round() % 255 == 0).double().mean()),
    }


def naive_evaluation(model, witness, items: list[dict]) -> dict[str, list[dict[str, float]]]:
    """Return row -> one dict of scores for each image."""
    images = [from_uint8(item["image"]) for item in items]
    samples = []
    for image, item in zip(images, items, strict=True):
        features = model.backbone.features(image[None])
        drawn = model.invert(features, NUM_SAMPLES, seed=5, indices=[item["index"]])
        samples.append([eight_bits(sample) for sample in drawn[0]])
    small = [resize(image[None], model.image_size)[0] for image in images]
    low = [eight_bits(image) for image in small]
    coded = [model.codec.decode(model.codec.encode(image[None]))[0] for image in small]

    def features(i: int, other: torch.Tensor, other_whole: torch.Tensor | None = None) -> dict:
        """By both classifiers; the inverted one saw the original whole, the witness small."""
        whole = other if other_whole is None else other_whole
        seen = naive_scores(witness, low[i], other)
        said = {"cosine": seen["spatial_cosine"], "top1": seen["top1_agreement"]}
        return naive_scores(model.backbone, images[i], whole) | {
            f"{WITNESS}_{name}": value for name, value in said.items()
        }

    def own(i: int, other: torch.Tensor) -> dict[str, float]:
        return features(i, other) | naive_pixels(small[i], other)

    def mean(found: list[dict[str, float]]) -> dict[str, float]:
        return {name: sum(s[name] for s in found) / len(found) for name in found[0]}

    def ceiling(i: int) -> dict[str, float]:
        saturated = {"saturated": naive_pixels(low[i], low[i])["saturated"]}
        return naive_scores(model.backbone, images[i], low[i]) | saturated

    def best(i: int) -> dict[str, float]:
        found = [own(i, sample) for sample in samples[i]]
        return max(found, key=lambda score: score["spatial_cosine"])

    def diversity(i: int) -> dict[str, float]:
        pixels = torch.stack(samples[i]) / 2
        deviation = ((pixels - pixels.mean(0)).square().sum(0) / (NUM_SAMPLES - 1)).sqrt()
        return {"diversity": float(deviation.mean())}

    numbers = range(len(images))
    return {
        "ceiling": [ceiling(i) for i in numbers],
        "codec": [own(i, eight_bits(coded[i])) for i in numbers],
        "reconstruction": [
            mean([own(i, sample) for sample in samples[i]]) | diversity(i) for i in numbers
        ],
        "best": [best(i) for i in numbers],
        "shuffled": [mean([features(i, s) for s in samples[OTHER[i]]]) for i in numbers],
        "floor": [features(i, low[OTHER[i]], images[OTHER[i]]) for i in numbers],
    }


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
    close = {"rtol": 1e-3, "atol": 1e-3, "check_like": True}  # an 8-bit value may round otherwise
    for options in ({"batch_size": 5}, {"batch_size": 1}):
        pd.testing.assert_frame_equal(
            scores(evaluated(model, items, **options)), reference, **close
        )
    drawn_singly = Evaluator(model, NUM_SAMPLES, 5, 1, precision="32-true", witnesses=[WITNESS])
    drawn_singly.run(DataLoader(items, batch_size=2))
    pd.testing.assert_frame_equal(scores(drawn_singly), reference, **close)


def test_the_seed_matters_for_what_is_drawn_only(model):
    one, two = scores(evaluated(model)), scores(evaluated(model, seed=6))
    for name in one:
        if name.endswith("cosine"):
            same = one[name].equals(two[name])
            assert same != name.startswith(("reconstruction", "best", "shuffled")), name


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
    assert "6 images of 3 photographs" in evaluation.caption()
    assert evaluated(model).metrics()["num_photographs"] == 3  # each is one of its own


def test_one_image_has_no_other(model, tmp_path):
    evaluation = evaluated(model, pictures(1))
    rows = evaluation.metrics()["rows"]
    assert list(rows) == ["ceiling", "codec", "reconstruction", "best"]
    cosine = rows["reconstruction"]["spatial_cosine"]
    assert cosine["low"] == cosine["mean"] == cosine["high"]
    evaluation.save(tmp_path, "python evaluate.py")
    assert set(json.loads((tmp_path / "metrics.json").read_text())["rows"]) == set(rows)


def test_a_single_class_is_told(model):
    evaluation = evaluated(model, [item | {"label": 3} for item in pictures()])
    assert evaluation.metrics()["same_class"] == 3
    assert "floor" in evaluation.metrics()["rows"]
    assert "For want of a second class, 3 of the images" in evaluation.caption()


def test_a_perfect_reconstruction_reaches_the_ceiling(tiny_config, monkeypatch):
    """Images of the model's own size: the ceiling is 1, and so is their own copy."""
    model = build_model(tiny_config).eval()
    items = pictures(size=model.image_size)
    originals = {item["index"]: from_uint8(item["image"]) for item in items}

    def copy(features, num_samples, *args, indices, **options):
        return torch.stack([originals[i].expand(num_samples, -1, -1, -1) for i in indices])

    monkeypatch.setattr(model, "invert", copy)
    rows = evaluated(model, items).metrics()["rows"]
    for name in INVERTED:
        perfect = 0 if name == "relative_l2" else 1
        assert rows["ceiling"][name]["mean"] == pytest.approx(perfect, abs=1e-5)
        assert rows["reconstruction"][name]["mean"] == pytest.approx(perfect, abs=1e-5)
        assert rows["shuffled"][name] == pytest.approx(rows["floor"][name], abs=1e-5)
    for name in ("normalised_cosine", f"{WITNESS}_cosine", f"{WITNESS}_top1", "contrast"):
        assert rows["reconstruction"][name]["mean"] == pytest.approx(1, abs=1e-5)
    assert rows["reconstruction"]["psnr"]["mean"] == 100  # not infinite
    assert rows["reconstruction"]["saturated"] == rows["ceiling"]["saturated"]
    assert rows["floor"]["spatial_cosine"]["mean"] < 0.999


def test_embeddings_agree_about_no_class(tiny_config):
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


def test_more_images_are_more_numbers(model):
    evaluation = evaluated(model, pictures(5))
    before = evaluation.metrics()
    assert evaluation.metrics() is before  # computed once
    more = [{**item, "index": 70 + i, "key": f"q{i}"} for i, item in enumerate(pictures(2))]
    evaluation.run(DataLoader(more, batch_size=2))
    assert evaluation.metrics()["num_images"] == 7
    assert evaluation.metrics()["sets"] != before["sets"]


LPIPS_NETWORK = "torchmetrics.functional.image.lpips._get_tv_model_features"


def test_lpips_is_torchmetrics_own(model, monkeypatch):
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


def test_lpips_without_its_weights(model, monkeypatch):
    monkeypatch.setattr("featinv.metrics.check_download", lambda url: None)

    def refuse(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(LPIPS_NETWORK, refuse)
    with pytest.raises(InputError, match="weights of LPIPS.*no route to host.*lpips=false"):
        Evaluator(model, lpips=True, witnesses=[])


def test_the_sampler_may_be_replaced(model):
    evaluation = evaluated(model, sampler={"num_steps": 2, "scheduler": "ddim"})
    assert (evaluation.settings.num_steps, evaluation.settings.scheduler) == (2, "ddim")
    assert evaluation.settings.guidance_scale == model.sampler.guidance_scale
    column = "reconstruction/spatial_cosine"
    assert scores(evaluated(model))[column].tolist() != scores(evaluation)[column].tolist()


def test_drawing_in_bfloat16_is_nearly_the_same_and_scores_are_exact(model):
    exact, half = (
        scores(evaluated(model, precision=precision)) for precision in ("32-true", "bf16-mixed")
    )
    ceiling = [column for column in exact if column.startswith("ceiling")]
    pd.testing.assert_frame_equal(exact[ceiling], half[ceiling], rtol=0, atol=0)
    own = "reconstruction/spatial_cosine"
    assert exact[own].tolist() != half[own].tolist()
    pd.testing.assert_series_equal(exact[own], half[own], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("faster", ["32-true", "bf16-mixed"])
def test_auto_draws_in_what_is_faster_and_records_it(model, monkeypatch, faster):
    seconds = {name: 1.0 if name == faster else 2.0 for name in ("32-true", "bf16-mixed")}
    monkeypatch.setattr("featinv.utils.precision.convolution_seconds", lambda device: seconds)
    found = evaluated(model, precision="auto")
    pd.testing.assert_frame_equal(scores(found), scores(evaluated(model, precision=faster)))
    assert found.metrics()["precision"] == faster and f"in {faster};" in found.caption()
    assert resolve_precision("auto", model.device) == faster


def test_the_clock_is_read_when_the_device_has_done_its_work(model, monkeypatch):
    """A device that is slow to finish what it was told."""
    monkeypatch.setattr(evaluator_module, "synchronize", lambda device: time.sleep(0.2))
    monkeypatch.setattr(
        model,
        "invert",
        lambda features, samples, **_: torch.zeros(len(features), samples, 3, 32, 32),
    )
    metrics = evaluated(model).metrics()  # two batches, six samples
    assert 6 * metrics["seconds_per_reconstruction"] >= 2 * 0.2


# What is written


def test_the_files(model, tmp_path):
    evaluation = evaluated(model, num_pictures=2)
    evaluation.save(tmp_path, "python evaluate.py", checkpoint="RUN")
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.json",
        "per_image.csv",
        "reconstructions.png",
        "table.md",
    }
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


def test_the_pictures_are_the_first_images(model):
    evaluation = evaluated(model, num_pictures=2)
    items = pictures()
    assert [picture["key"] for picture in evaluation._pictures] == ["p0", "p1"]
    for picture, item in zip(evaluation._pictures, items, strict=False):
        torch.testing.assert_close(picture["original"], item["image"])
        assert picture["samples"].shape == (2, 3, 32, 32)
        deviation = (picture["samples"][0].double() - picture["samples"][1].double()).abs() / 255
        torch.testing.assert_close(  # of two values: half their distance, times sqrt(2)
            picture["spread"].double(), (deviation / 2**0.5).mean(0), rtol=1e-4, atol=1e-5
        )
    own = scores(evaluation)["reconstruction/spatial_cosine"][:2].tolist()
    assert [float(p["cosine"].mean()) for p in evaluation._pictures] == pytest.approx(own)


def test_what_was_computed_is_saved_if_the_data_break(model, tmp_path):
    def broken():
        yield from DataLoader(pictures()[:2], batch_size=1)
        raise InputError("The data are broken.")

    evaluation = Evaluator(
        model, NUM_SAMPLES, seed=5, precision="32-true", witnesses=[WITNESS], num_pictures=1
    )
    with pytest.raises(InputError, match="broken"):
        evaluation.run(broken())
    evaluation.save(tmp_path, "python evaluate.py")
    written = pd.read_csv(tmp_path / "per_image.csv", index_col="index").drop(columns=ABOUT)
    pd.testing.assert_frame_equal(
        written, scores(evaluated(model))[:2], check_names=False, atol=1e-5, check_like=True
    )


# Bad input


def test_no_images(model):
    with pytest.raises(InputError, match="There is no image to evaluate"):
        Evaluator(model, witnesses=[]).run([])


def test_a_prior_cannot_be_evaluated(tiny_config):
    model = build_model({**tiny_config, "conditioning": "none"})
    with pytest.raises(InputError, match="is a prior"):
        Evaluator(model)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_samples": 0}, "num_samples is 0: expected an integer"),
        ({"batch_size": 1.5}, "batch_size is 1.5: expected an integer"),
        ({"seed": -1}, "seed is -1: expected an integer"),
        ({"precision": "16"}, "Unknown precision '16': choose from auto"),
        ({"sampler": {"num_steps": 0}}, "num_steps is 0"),
    ],
)
def test_values_out_of_range(model, options, sentence):
    with pytest.raises(InputError, match=sentence):
        Evaluator(model, **options)
