import json

import pytest

from depth import find_layers
from featinv import InputError
from settings import Setting

PHOTOS = ["data.crops_per_photo=1", "num_images=3", "num_samples=2", "witnesses=[]"]


def test_layers_stand_from_early_to_late(tiny, experiment, tmp_path):
    """Those of one model are scored like models of one layer each."""
    model = f"checkpoints=[{tiny('layers')}]"
    rows = experiment("depth", model, *PHOTOS, "num_pictures=2", output=tmp_path)
    assert [row["layer"] for row in rows] == ["layer2", "layer4"]
    assert [row["features"] for row in rows] == ["128 x 8 x 8", "512 x 2 x 2"]
    for row in rows:
        metrics = json.loads((tmp_path / row["layer"] / "metrics.json").read_text())
        assert metrics["layer"] == row["layer"]
        for title, (name, metric) in {
            "cosine": ("reconstruction", "spatial_cosine"),
            "floor": ("floor", "spatial_cosine"),
            "diversity": ("reconstruction", "diversity"),
        }.items():
            assert row[title].startswith(f"{metrics['rows'][name][metric]['mean']:.3f} [")
    page = (tmp_path / "table.md").read_text()
    assert f"- layer2: {tiny('layers')}, spatial; dpm_solver, 4 steps" in page
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "pictures.png").is_file()


def test_models_of_one_layer_each(tiny):
    found = find_layers(
        [Setting("late", str(tiny("spatial"))), Setting("early", str(tiny("middle")))]
    )
    assert [(setting.name, setting.layer) for setting in found] == [
        ("early", "layer2"),
        ("late", "layer4"),
    ]
    with pytest.raises(InputError, match="Unknown layer of backbone 'resnet10t' 'blocks.11'"):
        find_layers(
            [Setting("a", str(tiny("spatial"))), Setting("headless", str(tiny("headless")))]
        )
