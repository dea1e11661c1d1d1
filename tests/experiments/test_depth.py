import json

PHOTOS = ["data.crops_per_photo=1", "num_images=3", "num_samples=2", "witnesses=[]"]


def test_the_layers_stand_from_early_to_late(tiny, experiment, tmp_path):
    models = f"checkpoints=[{tiny('spatial')},{tiny('middle')}]"
    rows = experiment("depth", models, *PHOTOS, "num_pictures=2", output=tmp_path)
    assert [row["layer"] for row in rows] == ["layer2", "layer4"]
    assert [row["features"] for row in rows] == ["128 x 8 x 8", "512 x 2 x 2"]
    for row in rows:
        metrics = json.loads((tmp_path / row["model"] / "metrics.json").read_text())["rows"]
        for title, name in (("cosine", "reconstruction"), ("floor", "floor")):
            assert row[title].startswith(f"{metrics[name]['spatial_cosine']['mean']:.3f} [")
        assert row["diversity"].startswith(
            f"{metrics['reconstruction']['diversity']['mean']:.3f} ["
        )
    page = (tmp_path / "table.md").read_text()
    assert "- layer2: spatial conditioning; dpm_solver, 4 steps" in page
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "pictures.png").is_file()


def test_a_model_of_several_layers_is_one_for_each(tiny, experiment, tmp_path):
    model = f"checkpoints=[{tiny('layers')}]"
    rows = experiment("depth", model, *PHOTOS, "num_pictures=1", output=tmp_path)
    assert [row["model"] for row in rows] == ["layers_layer2", "layers_layer4"]
    assert [row["features"] for row in rows] == ["128 x 8 x 8", "512 x 2 x 2"]
    layers = [
        json.loads((tmp_path / row["model"] / "metrics.json").read_text())["layer"] for row in rows
    ]
    assert layers == ["layer2", "layer4"]


def test_models_that_do_not_compare_are_refused(tiny, refusal):
    said = refusal("depth", f"checkpoints=[{tiny('spatial')},{tiny('wide')}]")
    assert said.startswith("The models are of several backbones (spatial: resnet10t at 64 px, wide")
    said = refusal("depth", f"checkpoints=[{tiny('spatial')},{tiny('pooled')}]")
    assert said.startswith("'spatial' and 'pooled' are both of layer 'layer4'")
    assert "is a prior" in refusal("depth", f"checkpoints=[{tiny('prior')}]", *PHOTOS)
