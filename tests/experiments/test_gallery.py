import pytest
import torch

from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit

PHOTOS = ["data.crops_per_photo=1"]


@torch.no_grad()
def test_every_column_has_a_sampler_of_its_own(tiny, model, photographs, experiment, tmp_path):
    own = {"feature_guidance_scale": 1, "num_steps": 3}
    sampler = "{feature_guidance_scale: 1, num_steps: 3}"
    methods = f"methods={{guided: {{checkpoint: {tiny('spatial')}, sampler: {sampler}}}}}"
    models = f"checkpoints=[{tiny('spatial')},{tiny('layers')}]"
    command = [models, methods, *PHOTOS, "num_pictures=2", "seed=3"]
    rows = experiment("gallery", *command, output=tmp_path)
    assert [row["image"] for row in rows] == ["chelsea/0", "coffee/0"]
    assert list(rows[0]) == ["image", "spatial", "layers_layer4", "layers_layer2", "guided"]
    for i, row in enumerate(rows):
        features = model.backbone.features(photographs[i : i + 1])
        for name, options in {"spatial": {}, "guided": own}.items():
            drawn = eight_bit(model.invert(features, seed=3, indices=[i], **options)[:, 0])
            cosine = float(spatial_cosine(features, model.backbone.features(drawn)))
            assert float(row[name]) == pytest.approx(cosine, abs=2e-3)
    page = (tmp_path / "table.md").read_text()
    assert "- guided: resnet10t, layer layer4, spatial conditioning; dpm_solver, 3 steps" in page
    assert (tmp_path / "gallery.png").is_file()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("methods={a: {checkpoint: nowhere}}", "There is no checkpoint 'nowhere'"),
        ("checkpoints=[PRIOR]", "is a prior without feature guidance"),
    ],
)
def test_bad_input(override, sentence, tiny, refusal):
    assert sentence in refusal("gallery", override.replace("PRIOR", str(tiny("prior"))))
