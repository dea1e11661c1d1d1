import json

import pytest
import torch

from featinv.analysis.concepts import Concepts
from featinv.analysis.edits import mix
from featinv.explorer.inputs import Settings
from featinv.explorer.session import Exploration, Reconstruction
from featinv.metrics import spatial_cosine
from featinv.utils.errors import InputError
from featinv.utils.pixels import eight_bit, from_uint8, to_uint8

GUIDED = {"feature_guidance_scale": 5.0, "polish_steps": 2, "transform_noise": 0.1}


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "sampler", "precision"),
    [(None, {}, "32-true"), (None, {}, "bf16-mixed"), ("layer3", GUIDED, "32-true")],
)
def test_samples_are_those_of_the_library(exploration, photos, layer, sampler, precision):
    model, steps = exploration.model, []
    settings = Settings(5, 2, sampler, layer=layer, precision=precision)
    condition = exploration.condition(photos[:1], settings)
    view = from_uint8(exploration.view(photos[0]))[None]
    assert torch.equal(condition, model.backbone.features(view, layer))

    samples = exploration.draw(condition, settings, steps.append)
    drawn = [next(samples)]
    assert steps == [1, 2, 3, 4]  # each sample is drawn when it is asked for
    drawn += samples
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not model.unet._forward_hooks

    options = {"layer": layer, "seed": 5, "batch_size": 1, "precision": precision}
    expected = model.invert(condition, 2, **options, **sampler)[0]
    assert torch.stack([sample.image for sample in drawn]).equal(to_uint8(expected))
    seen, logits = model.backbone.features_and_logits(eight_bit(expected), layer)
    cosines = spatial_cosine(condition.expand_as(seen), seen)
    assert [sample.cosine for sample in drawn] == pytest.approx(cosines.tolist())
    top = logits.softmax(1).max(1)
    assert [s.probability for s in drawn] == pytest.approx(top.values.tolist(), rel=1e-4)
    assert [s.label for s in drawn] == [f"class {label}" for label in top.indices.tolist()]


def test_the_spread_has_a_calibration_ratio_only_with_an_original(exploration, photos):
    one = Reconstruction(torch.zeros(3, 32, 32, dtype=torch.uint8), 0.5, None, None)
    two = one._replace(image=one.image + 51)  # 0.2 of the range
    original = exploration._at_model_size(photos[0]).double() / 255
    to_original = [(original - value).square().mean().sqrt() for value in (0.0, 0.2)]
    ratio = 0.2 / (sum(to_original) / 2)
    spread = exploration.spread(photos[:1], Settings(factors={0: 1.0}), [one, two])
    assert spread.caption == f"spread {0.2 / 2**0.5:.3f}, calibration {ratio:.2f}"
    assert spread.image.shape == (3, 32, 32)
    for pictures, settings in ((photos, Settings()), (photos[:1], Settings(factors={0: 0.5}))):
        assert exploration.spread(pictures, settings, [one, two]).caption == "spread 0.141"
    assert exploration.spread(photos[:1], Settings(), [one]) is None


def test_progress_counts_steps_not_forward_passes(exploration, photos, monkeypatch):
    def in_two_passes(conditional, unconditional, both, scale):
        return lambda z_t, t: torch.lerp(unconditional(z_t, t), conditional(z_t, t), scale)

    monkeypatch.setattr("featinv.models.featinv.classifier_free_guidance", in_two_passes)
    settings, steps = Settings(num_samples=2), []
    list(exploration.draw(exploration.condition(photos[:1], settings), settings, steps.append))
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_features_are_mixed_and_then_steered(exploration, photos):
    def condition(*pictures, **settings):
        return exploration.condition(pictures, Settings(**settings))

    first, second = condition(photos[0]), condition(photos[1])
    mixed = condition(*photos, weight=0.3, path="spherical")
    torch.testing.assert_close(mixed, mix(first, second, 0.3, "spherical"))
    steered = condition(*photos, weight=0.3, path="spherical", factors={1: 0.0})
    torch.testing.assert_close(steered, exploration.concepts.steer(mixed, {1: 0.0}))
    # factors do not see each other's change
    both = condition(photos[0], factors={1: 0.0, 2: 2.0}) - first
    apart = [
        exploration.concepts.steer(first, {k: factor}) - first for k, factor in ((1, 0), (2, 2))
    ]
    torch.testing.assert_close(both, sum(apart), atol=1e-5, rtol=0)


def test_bad_values(exploration, photos):
    for values, sentence in (
        ({"num_samples": 17}, "num_samples is 17, expected 1 to 16"),
        ({"weight": 1.5}, "weight of the second image is 1.5, expected 0 to 1"),
        ({"factors": {0: 3.0}}, "factor of concept 0 is 3.0, expected 0 to 2"),
        ({"factors": {3: 0.0}}, "There is no concept 3: expected 0 to 2"),
        ({"factors": {0: 1.0}, "layer": "layer3"}, "of resnet10t layer4, but the chosen layer is"),
        ({"sampler": {"num_step": 3}}, "did you mean num_steps"),
    ):
        with pytest.raises(InputError, match=sentence):
            settings = Settings(**values)
            next(exploration.draw(exploration.condition(photos[:1], settings), settings))


def test_a_model_without_controlnet_needs_guidance(exploration, photos, monkeypatch):
    monkeypatch.setitem(exploration.model._modules, "controlnet", None)
    condition = exploration.condition(photos[:1], Settings())
    with pytest.raises(InputError, match="does not depend on the features: expected"):
        next(exploration.draw(condition, Settings()))
    guided = Settings(sampler={"polish_steps": 1})
    assert next(exploration.draw(condition, guided)).image.shape == (3, 32, 32)


def test_an_encoder_without_classes(exploration, photos, monkeypatch):
    monkeypatch.setattr(exploration.model.backbone, "classifies", False)
    condition = exploration.condition(photos[:1], Settings())
    sample = next(exploration.draw(condition, Settings()))
    assert sample.label is None and sample.caption == f"cosine {sample.cosine:.3f}"


def test_concepts_of_another_model(files, tmp_path):
    Concepts(torch.ones(1, 512), torch.zeros(512), "nmf", "resnet50 layer4").save(tmp_path / "c")
    with pytest.raises(
        InputError, match="of resnet50 layer4, expected concepts of resnet10t layer3"
    ):
        Exploration.load(str(files["checkpoint"]), str(tmp_path / "c"), torch.device("cpu"))


def test_settings_are_read_as_they_were_recorded(exploration, photos, tmp_path):
    path = tmp_path / "s.json"
    settings = Settings(7, 2, GUIDED, {2: 0.5}, 0.25, "spherical", None, "bf16-mixed")
    path.write_text(exploration.record(settings, photos))
    read = exploration.read(path, photos)
    assert (read.layer, read.precision, read.factors) == ("layer4", "bf16-mixed", {2: 0.5})
    assert exploration.record(read, photos) == path.read_text()
    # those of before layers and precision
    values = json.loads(path.read_text())
    del values["layer"], values["precision"]
    path.write_text(json.dumps(values))
    old = exploration.read(path, photos)
    assert (old.layer, old.precision, old.seed) == (None, "32-true", 7)


def test_settings_of_other_inputs(exploration, photos, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(exploration.record(Settings(), photos[:1]))
    plain = Exploration(exploration.model, None, {"checkpoint": exploration.hashes["checkpoint"]})
    for reader, pictures, key in (
        (exploration, photos[1:], "image"),
        (exploration, photos, "second"),
        (plain, photos[:1], "concepts"),
    ):
        with pytest.raises(InputError, match=f"made with another '{key}': expected SHA-256"):
            reader.read(path, pictures)


def test_unusable_settings(exploration, tmp_path):
    with pytest.raises(InputError, match="cannot be read .FileNotFoundError"):
        exploration.read(tmp_path / "s.json", [])
    rest = '"factors": {}, "sha256": {}}'
    for content, sentence in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (f'{{"sed": 0, {rest}', "cannot be read"),
        (f'{{"seed": "x", {rest}', "seed is 'x': expected an integer"),
        (f'{{"sampler": {{"feature_guidance_steps": 9}}, {rest}', "Unknown value of the sampler"),
    ):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(InputError, match=sentence):
            exploration.read(tmp_path / "s.json", [])
