import json
import shutil

import pytest

PHOTOS = ["data.crops_per_photo=1", "num_images=400", "num_samples=2", "witnesses=[]"]


@pytest.fixture(scope="module")
def made(tiny, experiment, tmp_path_factory):
    """The table of two models and a guided prior, its folder and command."""
    output = tmp_path_factory.mktemp("reconstruction")
    methods = f"{{free: {{checkpoint: {tiny('prior')}, sampler: {{feature_guidance_scale: 1}}}}}}"
    names = [str(tiny(variant)) for variant in ("spatial", "pooled", "prior")]
    command = [f"checkpoints=[{','.join(names)}]", f"methods={methods}", *PHOTOS]
    command += ["precision=32-true"]
    return experiment("reconstruction", *command, output=output), output, command


def test_every_model_is_a_row_and_every_backbone_has_its_bounds(made):
    rows, output, _ = made
    names = ["spatial (spatial)", "pooled (pooled)", "free (none)", "ceiling", "codec", "floor"]
    assert [row["model"] for row in rows] == names  # the prior alone inverts nothing
    metrics = json.loads((output / "pooled" / "metrics.json").read_text())["rows"]
    cosine, best = (metrics[row]["spatial_cosine"]["mean"] for row in ("reconstruction", "best"))
    assert rows[1]["cosine"].startswith(f"{cosine:.3f} [") and best >= cosine
    assert rows[1]["best of S"].startswith(f"{best:.3f} [")
    assert rows[3]["relative L2"].startswith(f"{metrics['ceiling']['relative_l2']['mean']:.3f} [")
    page = (output / "table.md").read_text()
    assert "3 images, 2 sample(s) each, seed 0" in page
    assert "Made by `python experiments/reconstruction.py " in page


def test_it_continues_with_what_is_missing_and_logs_the_table(
    made, experiment, tmp_path, monkeypatch
):
    rows, output, command = made
    shutil.copytree(output, tmp_path / "out")
    kept, missing = (tmp_path / "out" / name / "metrics.json" for name in ("spatial", "pooled"))
    before = kept.stat().st_mtime_ns
    missing.unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    again = experiment("reconstruction", *command, "wandb=true", output=tmp_path / "out")
    assert kept.stat().st_mtime_ns == before and missing.is_file()
    (table,) = (tmp_path / "out" / "wandb").rglob("reconstruction*.table.json")
    sent = json.loads(table.read_text())
    assert [dict(zip(sent["columns"], row, strict=True)) for row in sent["data"]] == again
    for row in (*rows, *again):
        del row["s per image"]
    assert again == rows


def test_results_of_other_settings_are_not_mixed(made, refusal):
    _, output, command = made
    said = refusal("reconstruction", *command, "sampler.num_steps=3", f"output={output}")
    assert "was made with sampler=" in said and "expected another folder" in said
