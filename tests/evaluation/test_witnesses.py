from types import SimpleNamespace

import pytest

from featinv.backbones import Backbone
from featinv.evaluation import witnesses
from featinv.evaluation.witnesses import load_witness, load_witnesses
from featinv.losses import PerceptualLoss
from featinv.utils.errors import InputError


def random_backbone(name: str, num_classes: int = 7) -> Backbone:
    return Backbone(name, weights="random", image_size=32, num_classes=num_classes)


def test_classifiers_that_took_part_are_left_out(monkeypatch, caplog):
    monkeypatch.setattr(witnesses, "extractor_backbone", lambda name, kind: random_backbone(name))
    inverted, in_loss, other = "test_resnet", "test_vit", "test_efficientnet"
    model = SimpleNamespace(backbone=random_backbone(inverted), perceptual=None, device="cpu")
    assert list(load_witnesses([inverted, in_loss, other], model)) == [in_loss, other]
    assert "test_resnet is not used as a witness: it is the backbone" in caplog.text
    assert load_witness(other, model).name == other
    with pytest.raises(InputError, match="'test_resnet' cannot be the witness, since it is the ba"):
        load_witness(inverted, model)
    model.perceptual = PerceptualLoss(random_backbone(in_loss))
    assert list(load_witnesses([inverted, in_loss, other], model)) == [other]
    assert "test_vit is not used as a witness: it is part of the perceptual loss" in caplog.text
    model.unet = SimpleNamespace(perceptual_networks={other})
    assert load_witnesses([inverted, in_loss, other], model) == {}
    assert "the perceptual loss that the prior was trained with" in caplog.text


def test_a_witness_must_classify(monkeypatch):
    monkeypatch.setattr(
        witnesses, "extractor_backbone", lambda name, kind: random_backbone(name, num_classes=0)
    )
    model = SimpleNamespace(backbone=random_backbone("test_resnet"))
    with pytest.raises(InputError, match="'test_vit' has no classes: expected a classifier"):
        load_witnesses(["test_vit"], model)
    with pytest.raises(InputError, match="'inception' has no spatial features"):
        load_witnesses(["inception"], model)
