import pytest

from featinv.utils.errors import InputError, at_least, listing, unknown


def test_unknown_offers_the_nearest_names_or_the_choices():
    error = unknown("backbone", "resnet5O", ["vgg11", "resnet101", "resnet50"])
    assert isinstance(error, InputError)
    assert str(error) == "Unknown backbone 'resnet5O': did you mean resnet50, resnet101?"
    assert str(unknown("layer", None, iter("ab"))) == "Unknown layer 'None': choose from a, b."
    error = unknown("layer", "?", [f"name{i}" for i in range(21)])
    assert str(error).endswith(
        "choose from name0, name1, name2, name3, name4, name5, name6, name7, "
        "name8, name9, name10, name11, name12, name13, name14, name15, name16, name17, name18, "
        "name19 and 1 more."
    )


@pytest.mark.parametrize("value", [0, 1.5, True, None])
def test_at_least(value):
    assert at_least("size", 1, 1) == 1
    with pytest.raises(InputError, match=f"size is {value}: expected an integer of at least 1"):
        at_least("size", value, 1)


def test_listing():
    assert listing([]) == "nothing"
    assert listing(range(7)) == "0, 1, 2, 3, 4 and 2 more"
