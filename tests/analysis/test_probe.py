import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from featinv.analysis.probe import Probe, fit_probe, pooled_features
from featinv.backbones import Backbone
from featinv.utils.errors import InputError

LABELS = torch.tensor([7, 980, 7, 3, 980, 3]).repeat(10)  # of three classes, in any numbering


@pytest.fixture(scope="module")
def backbone():
    return Backbone("test_resnet", weights="random", image_size=64)


@pytest.fixture
def features():
    """Maps whose averages are near one corner for each class, shape (60, 8, 2, 2)."""
    generator = torch.Generator().manual_seed(0)
    centre = 2 * torch.eye(8)[(LABELS % 5) % 8][:, :, None, None]
    return centre + torch.randn(60, 8, 2, 2, generator=generator)


def test_logistic_regression_is_that_of_scikit_learn(features, backbone):
    probe = fit_probe(features, LABELS, "logistic", 1000, backbone, inverse_strength=0.3)
    pooled = features.mean(dim=(2, 3)).double().numpy()
    rows = (pooled - pooled.mean(0)) / pooled.std(0, ddof=1)
    expected = LogisticRegression(C=0.3, max_iter=1000).fit(rows, LABELS)
    found = probe(features).double().softmax(dim=1).numpy()
    np.testing.assert_allclose(found[:, [3, 7, 980]], expected.predict_proba(rows), atol=1e-4)
    assert found.shape == (60, 1000) and (found > 0).sum() == 180  # no other class


def test_logistic_regression_of_two_classes(features, backbone):
    two = LABELS != 3
    probe = fit_probe(features[two], LABELS[two], "logistic", 1000, backbone)
    assert probe.measure(features[two], LABELS[two]) > 0.9


def test_neighbours_vote_by_their_cosines(features, backbone):
    probe = fit_probe(features[:40], LABELS[:40], "neighbours", 1000, backbone)
    pooled = features.mean(dim=(2, 3))
    for row, logits in zip(pooled[40:], probe(features[40:]), strict=True):
        cosines = [float(torch.cosine_similarity(row, other, dim=0)) for other in pooled[:40]]
        votes = dict.fromkeys([3, 7, 980], 0.0)
        for i in sorted(range(40), key=lambda i: -cosines[i])[:20]:
            votes[int(LABELS[i])] += np.exp(cosines[i] / 0.07)
        expected = torch.tensor(list(votes.values())) / sum(votes.values())
        found = logits.exp()[[3, 7, 980]]
        torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["logistic", "neighbours"])
def test_a_saved_probe_takes_maps_and_pooled_features(method, features, backbone, tmp_path):
    probe = fit_probe(features, LABELS, method, 1000, backbone)
    probe.save(tmp_path / "probe.safetensors")
    again = Probe.load(tmp_path / "probe.safetensors")
    torch.testing.assert_close(again(features.mean(dim=(2, 3))), probe(features))
    assert again.measure(features, LABELS) > 0.9
    with pytest.raises(InputError, match="have 9 channels, but the probe takes 8"):
        again(torch.zeros(1, 9))
    other = Backbone("test_resnet", weights="random", image_size=96)
    with pytest.raises(InputError, match="features of test_resnet at 64 px, not of test_resnet at"):
        again.attach(other)


@torch.no_grad()
def test_an_attached_probe_classifies(images):
    """Logits of a probe, and gradients through it, as of any classifier."""
    backbone = Backbone("vit_xsmall_patch16_clip_224", weights="random", image_size=64)
    seen = backbone.features(images)
    fit_probe(seen, torch.tensor([5, 8, 2]), "logistic", 10, backbone).attach(backbone)
    assert backbone.classify(images).argmax(1).tolist() == [5, 8, 2]
    with torch.enable_grad():
        images.requires_grad_()
        loss = torch.nn.functional.cross_entropy(backbone.classify(images), torch.tensor([2, 2, 2]))
        (gradient,) = torch.autograd.grad(loss, images)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_bad_input(features, backbone, tmp_path):
    path = tmp_path / "probe.safetensors"
    path.write_bytes(b"not a probe")
    with pytest.raises(InputError, match="cannot be read .*experiments/probe.py"):
        Probe.load(path)
    for number, method, num_classes, sentence in (
        (60, "logistics", 1000, "Unknown probe 'logistics': did you mean logistic"),
        (1, "neighbours", 1000, "of 1 classes, the last one 7: expected two or more"),
        (60, "neighbours", 100, "the last one 980: .* labels below num_classes=100"),
    ):
        with pytest.raises(InputError, match=sentence):
            fit_probe(features[:number], LABELS[:number], method, num_classes, backbone)
    batch = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "label": torch.tensor([3, -1])}
    with pytest.raises(InputError, match="Every image needs a label to fit a probe"):
        pooled_features(backbone, [batch])
