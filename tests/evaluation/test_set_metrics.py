import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance

from featinv import InputError
from featinv.evaluation import set_metrics
from featinv.evaluation.set_metrics import (
    Extractor,
    compare_sets,
    distance_name,
    frechet_distance,
    kernel_distance,
    precision_and_recall,
)
from featinv.utils.pixels import to_uint8


def normal(number: int, dims: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, dims, generator=generator)


def test_frechet_distance_is_the_formula():
    real, fake = normal(50, 6, 0), normal(70, 6, 1) * 1.5 + 0.3
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x.T)) for x in (real.numpy(), fake.numpy()))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(real, real + 2) == pytest.approx(4 * 6, rel=1e-4)


def test_kernel_distance_is_the_formula(monkeypatch):
    monkeypatch.setattr(set_metrics, "BLOCK", 5)
    real, fake = normal(12, 5, 0), normal(9, 5, 1) + 1.5

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a.double() @ b.double()) / 5 + 1) ** 3

    def mean(a: torch.Tensor, b: torch.Tensor, same: bool) -> float:
        pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j)]
        return sum(kernel(x, y) for x, y in pairs) / len(pairs)

    expected = mean(real, real, True) + mean(fake, fake, True) - 2 * mean(real, fake, False)
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-4)
    assert abs(kernel_distance(normal(300, 5, 0), normal(300, 5, 1))) < 0.2 * abs(expected)


def test_precision_and_recall_count_points_on_the_other_manifold():
    line = torch.arange(8.0)[:, None]  # the second neighbour of an inner point is 1 away
    fake = torch.tensor([[0.5], [3.25], [6.5], [20.0], [30.0], [40.0]])
    precision, recall = precision_and_recall(line, fake, k=2)
    assert precision == 3 / 6
    # Balls around 0.5, 3.25 and 6.5 reach 6, 3.25 and 6; those of the others cover more.
    assert recall == 1
    assert precision_and_recall(line, line) == (1, 1)
    assert precision_and_recall(line, line + 100) == (0, 0)


def test_an_extractor_averages_its_last_map():
    extractor = Extractor("lite0")
    images = torch.rand(2, 3, 96, 96) * 2 - 1
    seen = extractor(images)
    assert torch.allclose(seen, extractor.backbone.features(images).mean((2, 3)))


def refuse(*args, **options):
    raise OSError("no route to host")


def test_unavailable_extractors(monkeypatch):
    with pytest.raises(InputError, match="Unknown extractor 'lite9': did you mean lite"):
        Extractor("lite9")
    with pytest.raises(InputError, match="'resnet10t.c3_in1l': did you mean resnet10t.c3_in1k"):
        Extractor("resnet10t.c3_in1l")
    monkeypatch.setattr("timm.create_model", refuse)
    with pytest.raises(InputError, match="'resnet10t' could not be fetched from the hub"):
        Extractor("resnet10t")
    monkeypatch.setattr(set_metrics, "NoTrainInceptionV3", refuse)
    with pytest.raises(InputError, match="'inception' is unavailable .no route to host.: expected"):
        Extractor("inception")


def test_inception_is_the_network_of_fid(monkeypatch):
    pytest.importorskip("torch_fidelity", reason="its Inception network is torch-fidelity's")
    extractor = "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3"
    module = extractor.rsplit(".", 1)[0]  # random weights, always the same, for those of the net
    monkeypatch.setattr(f"{module}.load_state_dict_from_url", lambda *args, **options: {})
    monkeypatch.setattr(f"{extractor}.load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    extractor = Extractor("inception")
    torch.manual_seed(0)
    metric = FrechetInceptionDistance(feature=2048)
    images = torch.rand(3, 3, 80, 80) * 2 - 1
    metric.update(to_uint8(images), real=True)
    seen = extractor(images)
    names = [distance_name(name, extractor.name) for name in ("fd", "kid", "precision")]
    assert names == ["fid", "kid", "precision_inception"]  # that all know
    assert seen.shape == (3, 2048) and float(seen.std()) > 0
    torch.testing.assert_close(seen.double().sum(0), metric.real_features_sum, rtol=1e-4, atol=1e-4)


def test_the_numbers_are_those_of_torch_fidelity():
    pytest.importorskip("torch_fidelity", reason="it is what the numbers are checked against")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = normal(120, 8, 0).double(), normal(120, 8, 1).double() * 0.8 + 0.3
    found = compare_sets(real, fake)
    statistics = [fid_features_to_statistics(features) for features in (real, fake)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)
    assert found["fd"] == pytest.approx(fid["frechet_inception_distance"], rel=1e-5)
    kid = kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=120, verbose=False)
    assert found["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-5)
    shares = prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
    expected = (shares["precision"], shares["recall"])
    assert (found["precision"], found["recall"]) == pytest.approx(expected, abs=1e-6)
    assert expected[0] != expected[1] and max(expected) < 1


def test_each_distance_needs_enough_images():
    real, fake = normal(50, 5, 0), normal(50, 5, 1)
    few = {"kid", "precision", "recall"}
    assert compare_sets(real, fake).keys() == {"fd", *few}  # ten for each feature
    assert compare_sets(real[:49], fake[:49]).keys() == few
    assert compare_sets(real[:3], fake[:3]) == {}
