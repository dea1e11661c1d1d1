"""Tests on constructed features with known concepts."""

from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.functional import normalize

from featinv import InputError
from featinv.analysis.concepts import METHODS, SPARSITY, Concepts, find_concepts, importance
from featinv.backbones import Backbone

CHANNELS, SIZE = 12, 4


def directions(number: int = 3) -> Tensor:
    """Known concepts: nonnegative and orthogonal, each in channels of its own."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(number, CHANNELS)
    for k in range(number):
        channels = slice(k * CHANNELS // number, (k + 1) * CHANNELS // number)
        found[k, channels] = 0.2 + torch.rand(CHANNELS // number, generator=generator)
    return normalize(found, dim=1)


def present(number: int = 40, seed: int = 1, concepts: int = 3) -> Tensor:
    """Presences (N, K, h, w): at each position one concept, to a varying degree."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(concepts, (number, SIZE, SIZE), generator=generator)
    degree = 1 + torch.rand(number, SIZE, SIZE, generator=generator)
    return torch.nn.functional.one_hot(which, concepts).permute(0, 3, 1, 2) * degree[:, None]


def compose(presence: Tensor) -> Tensor:
    return torch.einsum("nkhw,kc->nchw", presence, directions())


def test_known_concepts_are_found_where_they_are():
    concepts = find_concepts(compose(present()), "nmf", 3, seed=0)
    torch.testing.assert_close(concepts.directions.norm(dim=1), torch.ones(3))
    cosine = directions() @ concepts.directions.T
    assert (cosine.max(dim=1).values > 0.95).all(), cosine
    unseen = present(5, seed=2)
    read = concepts.presence(compose(unseen))[:, cosine.argmax(dim=1)]
    assert (read - unseen).abs().mean() < 0.05


def test_clusters_are_assigned_by_distance_not_by_angle():
    """Not by the angle, which differs where the clusters are not equally far from the mean."""
    lengths = torch.tensor([0.3, 1, 3]).view(3, 1, 1)
    concepts = find_concepts(compose(present() * lengths), "kmeans", 3)
    centres = concepts.atoms + concepts.offset
    features = torch.randn(5, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    read = concepts.presence(features)
    assert ((read != 0).sum(dim=1) == 1).all(), "one at each position"
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    nearest = torch.cdist(rows, centres).argmin(dim=1)
    projected = (rows - concepts.offset) @ concepts.directions.T
    expected = torch.where(torch.arange(3) == nearest[:, None], projected, 0)
    torch.testing.assert_close(read.permute(0, 2, 3, 1).flatten(0, 2), expected)
    assert (nearest != projected.argmax(dim=1)).any()


def test_principal_components_explain_most_and_are_read_exactly():
    features = compose(present()) + 0.3
    concepts = find_concepts(features, "pca", CHANNELS)
    torch.testing.assert_close(concepts.directions @ concepts.directions.T, torch.eye(CHANNELS))
    read = concepts.presence(features)
    rebuilt = torch.einsum("nkhw,kc->nchw", read, concepts.directions)
    rebuilt = rebuilt + concepts.offset[:, None, None]
    torch.testing.assert_close(rebuilt, features, rtol=1e-3, atol=1e-3)
    variance = read.var(dim=(0, 2, 3))
    assert (variance[:-1] + 1e-6 >= variance[1:]).all()


@pytest.mark.parametrize("method", ["pca", "nmf"])
def test_removing_a_concept_removes_its_presence_and_no_other(method):
    features = compose(present(6))
    concepts = find_concepts(compose(present()), method, 3, seed=0)
    before = concepts.presence(features)
    for factor in (0, 2):
        after = concepts.presence(concepts.steer(features, {1: factor}))
        torch.testing.assert_close(after[:, 1], factor * before[:, 1], rtol=0.05, atol=0.05)
        others = [0, 2]
        torch.testing.assert_close(after[:, others], before[:, others], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_concepts_depend_on_the_seed_only_and_survive_a_file(method, tmp_path):
    features = compose(present(4))
    concepts = find_concepts(features, method, 3, seed=4, layer="here")
    again = find_concepts(features, method, 3, seed=4)
    assert torch.equal(concepts.directions, again.directions)
    torch.testing.assert_close(concepts.directions.norm(dim=1), torch.ones(3))
    mean = features.mean(dim=(0, 2, 3))
    torch.testing.assert_close(concepts.offset, 0 * mean if method == "nmf" else mean)
    concepts.save(tmp_path / "concepts.safetensors")
    loaded = Concepts.load(tmp_path / "concepts.safetensors")
    assert (loaded.method, loaded.layer, len(loaded)) == (method, "here", 3)
    assert torch.equal(loaded.presence(features), concepts.presence(features))


@pytest.mark.parametrize("method", ["pca", "kmeans"])
def test_files_of_earlier_versions_hold_directions_and_lengths(method, tmp_path):
    features = compose(present(4))
    concepts = find_concepts(features, method, 3, seed=4)
    tensors = {"directions": concepts.directions.contiguous(), "offset": concepts.offset}
    save_file(tensors, tmp_path / "old", {"method": method, "layer": ""})
    if method == "kmeans":
        with pytest.raises(InputError, match="cannot be read .it has no lengths."):
            Concepts.load(tmp_path / "old")
        tensors["lengths"] = concepts.atoms.norm(dim=1)
        save_file(tensors, tmp_path / "old", {"method": method, "layer": ""})
    loaded = Concepts.load(tmp_path / "old")
    torch.testing.assert_close(loaded.presence(features), concepts.presence(features))


def test_sparse_presences_solve_the_lasso():
    """Its optimality conditions, for 1/2 |x - u D|^2 + SPARSITY |u|_1 and x of unit length."""
    concepts = find_concepts(compose(present(4)), "dictionary", 3, seed=0)
    features = torch.randn(2, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    rows = features.permute(0, 2, 3, 1).flatten(0, 2) - concepts.offset
    lengths = rows.norm(dim=1, keepdim=True)
    u = concepts.presence(features).permute(0, 2, 3, 1).flatten(0, 2) / lengths
    correlation = (rows / lengths - u @ concepts.directions) @ concepts.directions.T
    assert correlation.abs().max() < SPARSITY + 1e-3
    active = u != 0
    assert 0.1 < active.float().mean() < 0.9
    expected = SPARSITY * u[active].sign()
    torch.testing.assert_close(correlation[active], expected, rtol=0, atol=1e-3)


def test_nonnegative_presences_are_least_squares():
    """For features that no combination of the concepts matches."""
    concepts = find_concepts(compose(present()), "nmf", 3, seed=0)
    features = torch.rand(2, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    read = concepts.presence(features).permute(0, 2, 3, 1).flatten(0, 2)
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    solved = [nnls(concepts.directions.T.double().numpy(), row.numpy())[0] for row in rows]
    expected = torch.from_numpy(np.stack(solved)).float()
    torch.testing.assert_close(read, expected, rtol=1e-3, atol=1e-4)


def test_importance_is_the_drop_of_the_images_own_logit():
    backbone = Backbone("resnet10t", weights="random", image_size=32, num_classes=4)
    features = torch.rand(5, 512, 1, 1, generator=torch.Generator().manual_seed(0))
    concepts = find_concepts(features, "pca", 2)
    logits = backbone.logits(features)
    classes = logits.argmax(dim=1)
    drops = importance(backbone, concepts, features, concepts.presence(features), classes)
    for i, k in product(range(5), range(2)):
        without = backbone.logits(concepts.steer(features[i : i + 1], {k: 0.0}))
        drop = logits[i, classes[i]] - without[0, classes[i]]
        torch.testing.assert_close(drops[i, k], drop, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda f: find_concepts(f, "nfm", 3), "Unknown method for concepts 'nfm': did you mean"),
        (lambda f: find_concepts(f, "pca", 13), "number of concepts is 13, expected 1 to 12"),
        (lambda f: find_concepts(f - 1, "nmf", 2), "NMF needs nonnegative features"),
        (lambda f: find_concepts(f, "pca", 2).presence(f[:, :3]), "3 channels, expected the 12"),
        (lambda f: find_concepts(f, "pca", 2).steer(f, {2: 0.0}), "no concept 2: expected 0 to 1"),
        (lambda f: Concepts.load("nothing"), "cannot be read .* file that Concepts.save wrote"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(compose(present(4)))
