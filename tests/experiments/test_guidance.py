import json

import pytest

PHOTOS = ["data.crops_per_photo=2", "num_images=6", "witnesses=[]", "extractors=[lite0]"]


def test_every_dropout_is_drawn_from_with_every_guidance(tiny, experiment, tmp_path):
    models = f"checkpoints=[{tiny('spatial')},{tiny('dropped')}]"
    rows = experiment("guidance", models, "scales=[3,1]", *PHOTOS, output=tmp_path)
    found = [(row["model"], row["dropout"], row["guidance"]) for row in rows]
    assert found == [
        ("spatial", "0.1", "1"),
        ("spatial", "0.1", "3"),
        ("dropped", "0.9", "1"),
        ("dropped", "0.9", "3"),
    ]
    psnr = [
        json.loads((tmp_path / name / "metrics.json").read_text())["rows"]["reconstruction"]["psnr"]
        for name in ("spatial_1", "spatial_3")
    ]
    assert psnr[0]["mean"] != psnr[1]["mean"], "guidance changes the draws"
    assert all(row["kid_lite0"] for row in rows)
    assert (tmp_path / "cosine_against_guidance.png").is_file()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("scales=[]", "scales is [], expected numbers, for example [1,1.75,3]."),
        ("scales=[-1]", "sampler.guidance_scale is -1, expected 0 or more"),
        ("scales=[high]", "scales is ['high'], expected numbers, for example [1,1.75,3]."),
        ("sampler.guidance_scale=2", "expected scales=[2]"),
    ],
)
def test_bad_input(override, sentence, tiny, refusal):
    assert sentence in refusal("guidance", f"checkpoints=[{tiny('spatial')}]", *PHOTOS, override)


def test_what_has_no_condition_is_refused(tiny, refusal):
    said = refusal("guidance", f"checkpoints=[{tiny('prior')}]", *PHOTOS, "scales=[1]")
    assert "is a prior without feature guidance" in said
