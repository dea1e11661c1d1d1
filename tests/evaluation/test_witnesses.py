import logging

import pytest

from featinv.backbones import Backbone
from featinv.evaluation import witnesses
from featinv.evaluation.witnesses import check_label_space, load_witnesses
from featinv.utils.errors import InputError


def random_backbone(name: str, num_classes: int = 7) -> Backbone:
    return Backbone(name, weights="random", image_size=32, num_classes=num_classes)


def test_the_inverted_backbone_is_no_witness(monkeypatch, caplog):
    monkeypatch.setattr(witnesses, "extractor_backbone", lambda name, kind: random_backbone(name))
    inverted = random_backbone("test_resnet")
    with caplog.at_level(logging.WARNING):
        found = load_witnesses(["test_efficientnet", "test_resnet"], inverted)
    assert list(found) == ["test_efficientnet"]
    assert "test_resnet is the backbone that is inverted" in caplog.text


def test_a_witness_must_classify(monkeypatch):
    headless = random_backbone("test_vit", num_classes=0)
    monkeypatch.setattr(witnesses, "extractor_backbone", lambda name, kind: headless)
    with pytest.raises(InputError, match="'test_vit' has no classes .*expected a classifier"):
        load_witnesses(["test_vit"], random_backbone("test_resnet"))
    with pytest.raises(InputError, match="'inception' gives no spatial features"):
        load_witnesses(["inception"], random_backbone("test_resnet"))


def test_answers_of_different_label_spaces_do_not_compare():
    seven, ten = random_backbone("test_resnet", 7), random_backbone("test_resnet", 10)
    check_label_space(seven, seven)
    with pytest.raises(InputError, match="tells 7 classes and 'test_resnet' 10"):
        check_label_space(seven, ten)
