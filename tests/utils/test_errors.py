import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from featinv.cli.mistakes import cause_of
from featinv.utils.errors import InputError, unknown


def test_unknown_offers_the_nearest_names_first():
    error = unknown("backbone", "resnet5O", ["vgg11", "resnet101", "resnet50"])
    assert isinstance(error, InputError)
    assert str(error) == "Unknown backbone 'resnet5O': did you mean resnet50, resnet101?"


def test_unknown_lists_few_choices_and_samples_many():
    assert str(unknown("layer", "?", ["a", "b"])) == "Unknown layer '?': choose from a, b."
    many = [f"name{i}" for i in range(21)]
    error = unknown("layer", "?", many)
    assert "21" in str(error) and str(error).endswith("name0, name1, name2.")


def test_unknown_takes_iterators_and_values_that_are_no_strings():
    assert "choose from a, b" in str(unknown("layer", None, iter(["a", "b"])))


def test_cause_of_finds_the_input_error_behind_hydra():
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "featinv.diffusion.Diffusion", "prediction_type": "velocity"})
    cause = cause_of(caught.value)
    assert isinstance(cause, InputError)
    assert "v_prediction" in str(cause)


def test_cause_of_an_argument_that_the_class_does_not_have():
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "featinv.sampling.SamplerConfig", "steps": 3})
    cause = cause_of(caught.value)
    assert isinstance(cause, InputError)
    assert "'steps'" in str(cause)


def test_cause_of_a_value_that_the_class_refuses():
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "torch.optim.AdamW", "params": [torch.zeros(1)], "lr": -1.0})
    cause = cause_of(caught.value)
    assert isinstance(cause, InputError)
    assert "learning rate: -1.0" in str(cause) and "\n" not in str(cause)


def test_cause_of_a_bug_is_the_bug_itself():
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "operator.truediv", "_args_": [1, 0]})
    assert isinstance(cause_of(caught.value), ZeroDivisionError)
    for bug in (ZeroDivisionError(), TypeError("no argument of the user's")):
        assert cause_of(bug) is bug  # nothing to do with the configuration
