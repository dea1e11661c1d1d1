import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from featinv.analysis.adapt import AdaptedBackbone, fit_adapter
from featinv.backbones import Backbone
from featinv.utils.errors import InputError


@pytest.fixture
def backbone():
    return Backbone("test_resnet", weights="random", image_size=64)


def maps(number: int, channels: int, size: int, seed: int) -> torch.Tensor:
    shape = (number, channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_relation_is_recovered_exactly(backbone):
    features = 3 * maps(40, 6, 4, seed=0) + 5
    weight, bias = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), torch.arange(3.0)
    targets = torch.einsum("oc,nchw->nohw", weight, features) + bias[:, None, None]
    adapted = fit_adapter(backbone, features, targets)
    torch.testing.assert_close(adapted.weight, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapted.bias, bias, atol=1e-3, rtol=1e-3)
    assert adapted.strength == 1e-7  # nothing is to be smoothed


def test_the_solution_is_scikit_learns_ridge(backbone):
    features, targets = maps(10, 5, 3, seed=0), maps(10, 4, 3, seed=1)
    adapted = fit_adapter(backbone, features, targets, strengths=[0.3])
    x = features.permute(0, 2, 3, 1).reshape(-1, 5).double()
    y = targets.permute(0, 2, 3, 1).reshape(-1, 4).double()
    alpha = 0.3 * float(x.var(0, correction=0).mean()) * len(x)
    expected = Ridge(alpha).fit(x, y)
    torch.testing.assert_close(
        adapted.weight.double(), torch.from_numpy(expected.coef_), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        adapted.bias.double(), torch.from_numpy(expected.intercept_), atol=1e-5, rtol=1e-4
    )


def test_cross_validation_picks_the_strength_that_does_best_on_other_images(backbone):
    """More channels than images, and noise: too weak a penalty fits the noise."""
    strengths = [1e-6, 1.0, 1e4]
    weight = torch.randn(2, 60, generator=torch.Generator().manual_seed(1)) / 8

    def relation(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = maps(number, 60, 1, seed)
        return x, torch.einsum("oc,nchw->nohw", weight, x) + maps(number, 2, 1, seed + 100)

    x, y = relation(50, seed=0)
    others, truth = relation(2000, seed=1)
    losses = {}
    for strength in strengths:
        one = fit_adapter(backbone, x, y, [strength])
        losses[strength] = float((one.adapt(others) - truth).square().mean())
    chosen = fit_adapter(backbone, x, y, strengths).strength
    assert chosen == min(losses, key=losses.get) == 1
    assert losses[chosen] < 0.8 * losses[strengths[0]]


def test_folds_hold_whole_images(backbone):
    """Constant maps: positions of an image give each other away, images do not."""
    x, y = (maps(12, channels, 1, seed=channels).expand(-1, -1, 4, 4) for channels in (20, 3))
    assert fit_adapter(backbone, x, y).strength >= 1  # nothing is to be learnt


def test_maps_are_resized_to_those_of_the_model(backbone):
    features = maps(8, 5, 7, seed=0)
    resized = F.interpolate(features, (3, 3), mode="bilinear", antialias=True)
    targets = resized[:, :2] * 2
    adapted = fit_adapter(backbone, features, targets)
    torch.testing.assert_close(adapted.adapt(features), targets, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_saved_map_gives_the_same_features_of_images(backbone, images, tmp_path):
    seen = backbone.features(images)
    adapted = fit_adapter(backbone, seen, maps(3, 4, 2, seed=0))
    adapted.save(tmp_path / "map.safetensors")
    again = AdaptedBackbone.load(tmp_path / "map.safetensors", backbone)
    assert again.features(images).shape == (3, 4, 2, 2)
    assert torch.equal(again.features(images), adapted.adapt(seen))
    other = Backbone("test_resnet", "layer2", weights="random", image_size=64)
    with pytest.raises(InputError, match="fitted to test_resnet, layer layer4"):
        AdaptedBackbone.load(tmp_path / "map.safetensors", other)
    with pytest.raises(InputError, match="cannot be read.*experiments/adapt.py"):
        AdaptedBackbone.load(tmp_path / "nothing.safetensors", backbone)


def test_one_image_is_too_few(backbone):
    with pytest.raises(InputError, match="of 1 image and targets of 1: expected the same number"):
        fit_adapter(backbone, maps(1, 2, 2, seed=0), maps(1, 2, 2, seed=1))
