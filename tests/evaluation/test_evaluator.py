import csv
import json
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import alexnet

from featinv import InputError
from featinv import evaluation as evaluation_module
from featinv.checkpoints import build_model
from featinv.evaluation.evaluator import METRICS, Evaluator
from featinv.evaluation.set_metrics import frechet_distance
from featinv.metrics import bootstrap_interval
from featinv.utils.pixels import from_uint8, resize

NUM_SAMPLES = 2


def pictures(number: int = 3, size: int = 64) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(number, 3, 6, 6, generator=generator)
    images = F.interpolate(coarse, (size, size), mode="bicubic").sigmoid().mul(255).byte()
    return [
        {"image": images[i], "index": 10 * i, "key": f"p{i}", "label": -1} for i in range(number)
    ]


@pytest.fixture
def model(tiny_model):
    """A model that uses its condition, and a classifier that does not always say the same."""
    generator = torch.Generator().manual_seed(3)
    for parameter in tiny_model.controlnet.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) / 20
    head = tiny_model.backbone.model.fc
    head.weight.data = torch.randn(head.weight.shape, generator=generator)
    return tiny_model.eval()


def evaluated(model, items=None, batch_size: int = 2, **options) -> Evaluator:
    evaluation = Evaluator(model, **{"num_samples": NUM_SAMPLES, "seed": 5} | options)
    evaluation.run(DataLoader(items or pictures(), batch_size=batch_size))
    return evaluation


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


def naive_psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = ((a.double() - b.double()) / 2).square().mean()
    return float(10 * (1 / error).log10())


def naive_evaluation(model, items: list[dict]) -> dict[str, list[dict[str, float]]]:
    """Return row -> one dict of scores for each image."""
    images = [from_uint8(item["image"]) for item in items]
    samples = []
    for image, item in zip(images, items, strict=True):
        features = model.backbone.features(image[None])
        drawn = model.invert(features, NUM_SAMPLES, seed=5, indices=[item["index"]])
        samples.append([eight_bits(sample) for sample in drawn[0]])
    small = [resize(image[None], model.image_size)[0] for image in images]
    coded = [model.codec.decode(model.codec.encode(image[None]))[0] for image in small]

    def scores(i: int, other: torch.Tensor) -> dict[str, float]:
        pixels = {"psnr": naive_psnr(eight_bits(small[i]), other)}
        return naive_scores(model.backbone, images[i], other) | pixels

    def mean(found: list[dict[str, float]]) -> dict[str, float]:
        return {name: sum(s[name] for s in found) / len(found) for name in found[0]}

    def best(i: int) -> dict[str, float]:
        found = [scores(i, sample) for sample in samples[i]]
        return max(found, key=lambda score: score["spatial_cosine"])

    def other(i: int, views: list[torch.Tensor]) -> dict[str, float]:
        return mean([naive_scores(model.backbone, images[i], view) for view in views])

    def diversity(i: int) -> dict[str, float]:
        pixels = torch.stack(samples[i]) / 2
        deviation = ((pixels - pixels.mean(0)).square().sum(0) / (NUM_SAMPLES - 1)).sqrt()
        return {"diversity": float(deviation.mean())}

    numbers = range(len(images))
    return {
        "ceiling": [other(i, [eight_bits(small[i])]) for i in numbers],
        "codec": [scores(i, eight_bits(coded[i])) for i in numbers],
        "reconstruction": [
            mean([scores(i, sample) for sample in samples[i]]) | diversity(i) for i in numbers
        ],
        "best": [best(i) for i in numbers],
        "shuffled": [other(i, samples[i - 1]) for i in numbers],
        "floor": [other(i, [images[i - 1]]) for i in numbers],
    }


def test_every_number_is_that_of_a_naive_loop(model):
    expected = naive_evaluation(model, pictures())
    values = evaluated(model).per_image()
    assert set(values) == {f"{row}/{m}" for row, scores in expected.items() for m in scores[0]}
    for row, scores in expected.items():
        for name in scores[0]:
            wanted = torch.tensor([score[name] for score in scores])
            torch.testing.assert_close(values[f"{row}/{name}"], wanted, rtol=1e-4, atol=1e-5)
    # or the test could not tell the rows apart
    cosines = [values[f"{row}/spatial_cosine"] for row in expected]
    assert len({tuple(row.tolist()) for row in cosines}) == 6
    agreements = {tuple(values[f"{row}/top1_agreement"].tolist()) for row in expected}
    assert len(agreements) > 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_does_not_matter(model, batch_size):
    reference = evaluated(model, batch_size=2).per_image()
    values = evaluated(model, batch_size=batch_size).per_image()
    torch.testing.assert_close(values, reference, rtol=1e-4, atol=1e-5)
    drawn_singly = evaluated(model, batch_size=3).per_image()
    torch.testing.assert_close(drawn_singly, reference, rtol=1e-4, atol=1e-5)


def test_how_many_are_drawn_at_once_does_not_matter(model):
    reference = evaluated(model).per_image()
    values = evaluated(model, **{"num_pictures": 1}).per_image()
    torch.testing.assert_close(values, reference, rtol=0, atol=0)
    evaluation = Evaluator(model, NUM_SAMPLES, seed=5, batch_size=1)
    evaluation.run(DataLoader(pictures(), batch_size=2))
    torch.testing.assert_close(evaluation.per_image(), reference, rtol=1e-4, atol=1e-5)


def test_the_seed_matters_for_what_is_drawn_only(model):
    one, two = evaluated(model).per_image(), evaluated(model, seed=6).per_image()
    for name in one:
        same = torch.equal(one[name], two[name])
        if name.endswith("cosine"):
            assert same != name.startswith(("reconstruction", "best", "shuffled")), name


def test_summary_and_interval(model):
    evaluation = evaluated(model)
    summary = evaluation.summary()
    for name, values in evaluation.per_image().items():
        row, metric = name.split("/")
        mean = sum(values.tolist()) / 3
        assert summary[row][metric]["mean"] == pytest.approx(mean, abs=1e-6)
        low, high = bootstrap_interval(values)
        assert (summary[row][metric]["low"], summary[row][metric]["high"]) == (low, high)
        assert float(values.min()) - 1e-6 <= low <= mean <= high <= float(values.max()) + 1e-6


def test_one_image_has_no_other(model, tmp_path):
    evaluation = evaluated(model, pictures(1))
    summary = evaluation.summary()
    assert list(summary) == ["ceiling", "codec", "reconstruction", "best"]
    cosine = summary["reconstruction"]["spatial_cosine"]
    assert cosine["low"] == cosine["mean"] == cosine["high"]
    evaluation.save(tmp_path, "python evaluate.py")
    assert set(json.loads((tmp_path / "metrics.json").read_text())["rows"]) == set(summary)


def test_a_perfect_reconstruction_reaches_the_ceiling(tiny_config, monkeypatch):
    """Images of the model's own size: the ceiling is 1, and so is their own copy."""
    model = build_model(tiny_config).eval()
    items = pictures(size=model.image_size)
    originals = {item["index"]: from_uint8(item["image"]) for item in items}

    def copy(features, num_samples, *args, indices, **options):
        return torch.stack([originals[i].expand(num_samples, -1, -1, -1) for i in indices])

    monkeypatch.setattr(model, "invert", copy)
    summary = evaluated(model, items).summary()
    for row in ("ceiling", "reconstruction"):
        for name in METRICS:
            perfect = 0 if name == "relative_l2" else 1
            assert summary[row][name]["mean"] == pytest.approx(perfect, abs=1e-5), (row, name)
    assert summary["reconstruction"]["psnr"]["mean"] == 100  # not infinite
    for name in METRICS:
        assert summary["shuffled"][name] == pytest.approx(summary["floor"][name], abs=1e-5)
    assert summary["floor"]["spatial_cosine"]["mean"] < 0.999


def test_a_single_sample_has_no_diversity(model):
    evaluation = evaluated(model, num_samples=1)
    assert set(evaluation.summary()["reconstruction"]) == {*METRICS, "psnr"}


class Colours:
    """Judges images by their mean red and green."""

    num_features = 2

    def __init__(self, name: str = "lite0") -> None:
        self.name = name

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :2].mean((2, 3))


def test_sets_are_compared_once_there_are_enough_images(model, tmp_path, monkeypatch):
    monkeypatch.setattr("featinv.evaluation.evaluator.Extractor", Colours)
    assert evaluated(model, pictures(3)).distances() == {}
    items = pictures(5)
    evaluation = evaluated(model, items)
    evaluation.save(tmp_path, "python evaluate.py")
    saved = json.loads((tmp_path / "metrics.json").read_text())["sets"]
    assert saved == evaluation.distances()
    saved = saved["lite0"]
    images = torch.stack([from_uint8(item["image"]) for item in items])
    features = model.backbone.features(images)
    drawn = model.invert(features, NUM_SAMPLES, seed=5, indices=[i["index"] for i in items])
    first = eight_bits(drawn[:, 0])
    expected = frechet_distance(Colours()(images), Colours()(first))
    assert saved["reconstruction"]["fd"] == pytest.approx(expected, rel=1e-3)
    assert saved["ceiling"]["fd"] < expected and saved["ceiling"]["recall"] > 0.5
    assert f" {saved['best']['fd']:.2f} |" in (tmp_path / "table.md").read_text()


def test_few_images_have_no_frechet_distance(model, monkeypatch):
    monkeypatch.setattr("featinv.evaluation.evaluator.Extractor", Colours)
    monkeypatch.setattr(
        Colours, "__call__", lambda extractor, images: images[:, :, :2, 0].flatten(1)
    )
    evaluation = evaluated(model, pictures(5))  # six numbers each
    assert set(evaluation.distances()["lite0"]["best"]) == {"kid", "precision", "recall"}
    assert not any("fd_lite0" in row for row in evaluation.table_rows())


def test_sets_are_compared_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr("featinv.evaluation.evaluator.Extractor", Colours)
    compare = Mock(wraps=evaluation_module.compare_sets)
    monkeypatch.setattr(evaluation_module, "compare_sets", compare)
    evaluation = evaluated(model, pictures(5))
    evaluation.save(tmp_path, "python evaluate.py")
    evaluation.table_rows()
    assert compare.call_count == 4  # ceiling, codec, reconstruction and best
    before = evaluation.distances()
    more = [{**item, "index": 70 + i, "key": f"q{i}"} for i, item in enumerate(pictures(2))]
    evaluation.run(DataLoader(more, batch_size=2))
    assert evaluation.distances() != before and compare.call_count == 8


LPIPS_NETWORK = "torchmetrics.functional.image.lpips._get_tv_model_features"


def test_lpips_is_torchmetrics_own(model, monkeypatch):
    torch.manual_seed(0)
    network = alexnet(weights=None).features  # its weights cannot be had everywhere
    monkeypatch.setattr(LPIPS_NETWORK, lambda name, pretrained: network)
    values = evaluated(model, lpips=True).per_image()
    small = [resize(from_uint8(item["image"])[None], model.image_size) for item in pictures()]
    lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    for i, image in enumerate(small):
        coded = model.codec.decode(model.codec.encode(image))
        expected = float(lpips(eight_bits(image), eight_bits(coded)))
        assert float(values["codec/lpips"][i]) == pytest.approx(expected, rel=1e-3)
    assert bool((values["reconstruction/lpips"] > 0).all()) and "ceiling/lpips" not in values
    assert values.keys() - evaluated(model).per_image().keys() == {
        f"{row}/lpips" for row in ("codec", "reconstruction", "best")
    }


def test_lpips_without_its_weights(model, monkeypatch):
    def refuse(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(LPIPS_NETWORK, refuse)
    with pytest.raises(InputError, match="weights of LPIPS.*no route to host.*lpips=false"):
        Evaluator(model, lpips=True)


def test_the_sampler_may_be_replaced(model):
    evaluation = evaluated(model, sampler={"num_steps": 2, "scheduler": "ddim"})
    assert (evaluation.settings.num_steps, evaluation.settings.scheduler) == (2, "ddim")
    assert evaluation.settings.guidance_scale == model.sampler.guidance_scale
    own = evaluated(model).per_image()["reconstruction/spatial_cosine"]
    other = evaluation.per_image()["reconstruction/spatial_cosine"]
    assert not torch.allclose(own, other, atol=1e-6)


def test_drawing_in_bfloat16_is_nearly_the_same_and_scores_are_exact(model):
    exact, half = evaluated(model).per_image(), evaluated(model, precision="bf16-mixed").per_image()
    for name in METRICS:
        assert torch.equal(exact[f"ceiling/{name}"], half[f"ceiling/{name}"])
    own = "reconstruction/spatial_cosine"
    assert not torch.equal(exact[own], half[own])
    torch.testing.assert_close(exact[own], half[own], rtol=0.02, atol=0.02)
    with pytest.raises(InputError, match="Unknown precision '16': choose from 32-true"):
        evaluated(model, precision="16")


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
    assert metrics["rows"] == evaluation.summary()
    assert metrics["checkpoint"] == "RUN"
    assert (metrics["num_images"], metrics["num_samples"], metrics["seed"]) == (3, 2, 5)
    assert metrics["seconds_per_reconstruction"] == pytest.approx(evaluation.seconds / 6)
    assert metrics["sampler"]["scheduler"] == "dpm_solver"
    with (tmp_path / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["index"], row["key"]) for row in rows] == [("0", "p0"), ("10", "p1"), ("20", "p2")]
    values = evaluation.per_image()
    for name in values:
        assert [float(row[name]) for row in rows] == pytest.approx(values[name].tolist(), abs=1e-6)
    table = (tmp_path / "table.md").read_text()
    for row in evaluation.summary().values():
        for cell in row.values():
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
    own = evaluation.per_image()["reconstruction/spatial_cosine"]
    cosines = torch.stack([picture["cosine"] for picture in evaluation._pictures])
    torch.testing.assert_close(cosines.mean(1), own[:2])


def test_what_was_computed_is_saved_if_the_data_break(model, tmp_path):
    def broken():
        yield from DataLoader(pictures()[:2], batch_size=1)
        raise InputError("The data are broken.")

    evaluation = Evaluator(model, NUM_SAMPLES, seed=5)
    with pytest.raises(InputError, match="broken"):
        evaluation.run(broken())
    evaluation.save(tmp_path, "python evaluate.py")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_images"] == 2
    reference = evaluated(model).per_image()
    for name in METRICS:
        own = metrics["rows"]["reconstruction"][name]["mean"]
        assert own == pytest.approx(float(reference[f"reconstruction/{name}"][:2].mean()), abs=1e-5)
    # only the second image has another one before it
    floor = metrics["rows"]["floor"]["spatial_cosine"]["mean"]
    assert floor == pytest.approx(float(reference["floor/spatial_cosine"][1]), abs=1e-5)
    assert len((tmp_path / "per_image.csv").read_text().splitlines()) == 1 + 2


# Bad input


def test_no_images(model):
    with pytest.raises(InputError, match="There is no image to evaluate"):
        Evaluator(model).run([])


def test_a_prior_cannot_be_evaluated(tiny_config):
    model = build_model({**tiny_config, "conditioning": "none"})
    with pytest.raises(InputError, match="is a prior"):
        Evaluator(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_samples", 0),
        ("num_pictures", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("num_samples", 1.5),
    ],
)
def test_values_out_of_range(model, name, value):
    with pytest.raises(InputError, match=f"{name} is {value}: expected an integer"):
        Evaluator(model, **{name: value})


def test_a_sampler_out_of_range(model):
    with pytest.raises(InputError, match="num_steps is 0"):
        Evaluator(model, sampler={"num_steps": 0})
