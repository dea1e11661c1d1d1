import pytest
import torch

from featinv import InputError
from featinv.evaluation.cache import load_or_make


def test_tensors_are_cached_for_the_same_settings_only(tmp_path):
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"a": torch.arange(4).view(2, 2).T}

    path, wanted = tmp_path / "new" / "x.safetensors", {"seed": 0, "steps": (1, 2), "data": None}
    first, again = load_or_make(path, wanted, make), load_or_make(path, wanted, make)
    assert made == [1] and torch.equal(first["a"], again["a"])
    with pytest.raises(InputError, match="was made with seed=0, not 1: expected another folder"):
        load_or_make(path, wanted | {"seed": 1}, make)
