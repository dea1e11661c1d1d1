import pytest
import torch
from torch import Tensor

from featinv import InputError
from featinv.analysis.planted import TRUTHS, Mirror, Planted, kept_error, load_planted
from featinv.checkpoints import build_model, load_model, save_model

LINEAR = ("luminance", "low_pass", "blind", "linear")


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic").clamp(-1, 1)


def length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


@pytest.mark.parametrize("name", LINEAR)
def test_an_image_is_the_sum_of_its_kept_and_discarded_parts(name, pictures):
    truth = load_planted(name)
    kept, discarded = truth.kept(pictures), truth.discarded(pictures)
    torch.testing.assert_close(kept + discarded, pictures)
    assert (length(discarded) > 0.05 * length(pictures)).all()
    # The features tell `kept` and nothing else: they see no other image's discarded part.
    torch.testing.assert_close(truth.kept(kept), kept, rtol=0, atol=1e-5)
    changed = pictures + discarded.roll(1, 0)
    features = truth.features(pictures)
    torch.testing.assert_close(truth.features(changed), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(truth.features(kept), features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TRUTHS)
def test_features_lie_on_16_by_16_positions_of_images_of_any_size(name, pictures):
    truth = load_planted(name)
    features = truth.features(pictures)
    assert features.shape[1:] == truth.feature_shape == (truth.channels, 16, 16)
    assert 0.1 < features.std() < 3
    large = torch.nn.functional.interpolate(pictures, scale_factor=2, mode="nearest")
    assert (length(truth.features(large) - features) < 0.1 * length(features)).all()
    images = pictures.clone().requires_grad_()
    truth.features(images).square().sum().backward()
    assert (length(images.grad) > 0).all()


def test_features_by_hand(pictures):
    block = pictures[1, :, 8:16, 24:32]  # of position (1, 3)
    luminance = 0.299 * block[0] + 0.587 * block[1] + 0.114 * block[2]
    found = {name: load_planted(name).features(pictures)[1, :, 1, 3] for name in TRUTHS}
    torch.testing.assert_close(found["luminance"], luminance.flatten())
    torch.testing.assert_close(found["low_pass"], block.mean(dim=(1, 2)))
    assert torch.equal(found["blind"], found["low_pass"])
    assert not load_planted("blind").features(pictures)[:, :, 8:, 8:].any()


def test_the_random_projection_is_orthonormal_and_fixed(pictures):
    truth = load_planted("linear")
    rows = truth.projection[:, :, 0, 0]
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), rtol=0, atol=1e-5)
    assert torch.equal(rows, load_planted("linear").projection[:, :, 0, 0])


def test_an_image_and_its_mirror_image_are_the_two_modes(pictures):
    truth = Mirror()
    mirrored = pictures.flip(3)
    features = truth.features(pictures)
    torch.testing.assert_close(truth.features(mirrored), features, rtol=0, atol=1e-5)
    symmetric = (pictures + mirrored) / 2
    for images, mode in ((pictures, 1.0), (mirrored, -1.0), (symmetric, 0.0)):
        found = truth.mode(images, pictures)
        torch.testing.assert_close(found, torch.full((4,), mode), rtol=0, atol=1e-4)
    torch.testing.assert_close(truth.discarded(mirrored), -truth.discarded(pictures))
    # Half of the image mirrored, sign by sign: no third mode.
    odd = truth.discarded(pictures)
    half = odd.clone()
    half[..., :32], half[..., -32:] = -odd[..., :32], -odd[..., -32:]
    even = (pictures + mirrored) / 2
    both = truth.features(torch.cat([even + odd, even - odd, even + half]))
    whole, other, third = (part.flatten(1) for part in both.chunk(3))
    assert (length(whole - other) < 1e-4 * length(whole)).all()
    assert (length(whole - third) > 1e-2 * length(whole)).all()


def test_the_kept_error_is_0_for_perfect_samples_and_1_for_another_image(pictures):
    truth = load_planted("low_pass")
    others = pictures.roll(1, 0)
    right = torch.stack([pictures, pictures + truth.discarded(others)], dim=1)
    assert (kept_error(truth, right, pictures, others) < 1e-5).all()
    error = kept_error(truth, others[:, None], pictures, others)
    torch.testing.assert_close(error, torch.ones(4))
    half = (truth.kept(pictures) + truth.kept(others)) / 2
    assert kept_error(truth, half[:, None], pictures, others) == pytest.approx(0.5, abs=1e-4)


def test_a_model_on_a_planted_truth_is_saved_and_loaded(tiny_config, tmp_path, pictures):
    tiny_config["backbone"] = {
        "_target_": "featinv.analysis.planted.load_planted",
        "name": "blind",
        "image_size": 32,
    }
    model = build_model(tiny_config)
    save_model(model, tmp_path / "model.safetensors")
    found = load_model(tmp_path / "model.safetensors")
    assert isinstance(found.backbone, Planted) and not found.backbone.classifies
    features = found.backbone.features(pictures)
    assert torch.equal(found.invert(features, seed=1), model.eval().invert(features, seed=1))


def test_bad_input():
    with pytest.raises(InputError, match="Unknown planted truth 'low_pas': did you mean low_pass"):
        load_planted("low_pas")
    with pytest.raises(InputError, match="image_size is 120, expected a multiple of 16 .* 128"):
        load_planted("blind", 120)
    with pytest.raises(InputError, match="'mirror' has no classes"):
        Mirror().classify(torch.zeros(1, 3, 128, 128))
    with pytest.raises(InputError, match="Unknown layer of backbone 'mirror' 'layer4'"):
        Mirror().use_layer("layer4")


def test_a_probe_tells_classes_from_a_planted_map(pictures):
    truth = load_planted("low_pass")
    truth.use_layer("last")
    truth.use_probe(lambda features: features.mean(dim=(2, 3)), "last", 3)
    features, logits = truth.features_and_logits(pictures)
    torch.testing.assert_close(logits, pictures.mean(dim=(2, 3)))
    for found in (truth.classify(pictures), truth.logits(features)):
        assert torch.equal(found, logits)
