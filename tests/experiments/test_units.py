import json

import pytest
import torch
from omegaconf import OmegaConf

from featinv import InputError
from featinv.utils.pixels import eight_bit
from units import COLUMNS, choices, locality, map_cosine, obtained_share

PHOTOS = ["data.crops_per_photo=1", "num_images=3"]


def flat_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.flatten(), b.flatten()
    return float(a @ b / (a.norm() * b.norm()))


@torch.no_grad()
def test_every_number_is_that_of_a_naive_loop(tiny, model, photographs, experiment, tmp_path):
    own = ["num_samples=2", "channels=0.02", "value=5"]
    rows = experiment("units", f"checkpoint={tiny('spatial')}", *PHOTOS, *own, output=tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == ["centre", "corner", "10 channels", "unit"]
    assert [row["change inside / outside the position"] != "" for row in rows] == [1, 1, 0, 1]
    backbone = model.backbone
    for i, image in enumerate(photographs):
        features, logits = backbone.features_and_logits(image[None])
        edited = features.clone()
        edited[0, :, 1, 1] = 5  # the map is 2 x 2
        before, after = (
            eight_bit(model.invert(f, 2, seed=0, indices=[i])[0]) for f in (features, edited)
        )
        values = dict.fromkeys(COLUMNS, 0.0)
        for a, b in zip(before, after, strict=True):
            (seen_a, logits_a), (seen_b, logits_b) = (
                backbone.features_and_logits(x[None]) for x in (a, b)
            )
            change = (a - b).abs() / 2
            rest = change.clone()
            rest[:, 16:, 16:] = 0  # the lower right quarter of 32 x 32 pixels
            quarter = float(change[:, 16:, 16:].mean())
            step, wanted = (seen_b - seen_a).flatten(), (edited - features).flatten()
            label = int(logits.argmax())
            probabilities = [x.softmax(1)[0, label] for x in (logits_a, logits_b)]
            values["change"] += float(change.mean()) / 2
            values["inside"] += quarter / float(rest.sum() / (3 * 3 * 16 * 16)) / 2
            values["obtained"] += float(step @ wanted / (wanted @ wanted)) / 2
            values["edited"] += flat_cosine(edited, seen_b) / 2
            values["original"] += flat_cosine(features, seen_b) / 2
            values["probability"] += float(probabilities[1] - probabilities[0]) / 2
        assert values["change"] > 1e-3
        for name, value in values.items():
            assert found["centre"][name][i] == pytest.approx(value, rel=2e-2, abs=1e-3), name
    page = (tmp_path / "table.md").read_text()
    assert "set to 5; 3 images, 2 sample(s) each, seed 0" in page
    assert (tmp_path / "units.png").is_file()


def test_positions_and_channels_are_those_of_the_config():
    config = {"positions": [[0, 1]], "channels": 0.5, "unit": False}
    made = choices(OmegaConf.create(config), (4, 2, 2))
    assert list(made) == ["position 0, 1", "2 channels"]
    features = torch.randn(3, 4, 2, 2)
    expected = torch.zeros(3, 4, 2, 2, dtype=torch.bool)
    expected[:, :, 0, 1] = True
    assert torch.equal(made["position 0, 1"](features), expected)
    with pytest.raises(InputError, match=r"positions is \[3\]: expected \[\[row, column\], ...\]"):
        choices(OmegaConf.create(config | {"positions": [3]}), (4, 2, 2))
    with pytest.raises(InputError, match="no position 0, 2: expected rows 0 to 1 and columns 0 t"):
        choices(OmegaConf.create(config | {"positions": [[0, 2]]}), (4, 2, 2))


def test_locality_is_the_ratio_of_two_means():
    change = torch.ones(2, 9, 9)
    change[0, 3:6, 6:] = 5.0
    where = torch.zeros(2, 3, 3, dtype=torch.bool)
    where[:, 1, 2] = True
    assert locality(change, where).tolist() == pytest.approx([5, 1])


def test_the_obtained_share_is_a_projection():
    wanted = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    across = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    across -= obtained_share(across, wanted)[:, None, None, None] * wanted
    shares = torch.tensor([0.0, 0.5, 2.0])
    found = obtained_share(across + shares[:, None, None, None] * wanted, wanted)
    torch.testing.assert_close(found, shares, rtol=1e-4, atol=1e-5)


def test_the_cosine_of_maps_ignores_zero_positions():
    a = torch.tensor([[3.0, 0], [4, 0]]).view(1, 2, 2, 1)
    assert map_cosine(a, 2 * a).tolist() == pytest.approx([1])
    assert map_cosine(a, a + torch.tensor([[0.0, 5], [0, 0]]).view(1, 2, 2, 1)).tolist() == (
        pytest.approx([0.5**0.5])
    )
