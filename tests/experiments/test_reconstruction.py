import json
import shutil

import pytest

PHOTOS = ["data.crops_per_photo=1", "num_images=400", "num_samples=2", "witnesses=[]"]
PHOTOS += ["precision=32-true"]


@pytest.fixture(scope="module")
def made(tiny, experiment, tmp_path_factory):
    """The table of two models and a prior that is guided, and its folder."""
    output = tmp_path_factory.mktemp("reconstruction")
    methods = f"{{free: {{checkpoint: {tiny('prior')}, sampler: {{feature_guidance_scale: 1}}}}}}"
    names = [str(tiny(variant)) for variant in ("spatial", "pooled", "prior")]
    command = [f"checkpoints=[{','.join(names)}]", f"methods={methods}", *PHOTOS]
    return experiment("reconstruction", *command, output=output), output, command


def test_every_model_is_a_row_and_every_backbone_has_its_bounds(made):
    rows, output, _ = made
    names = ["spatial (spatial)", "pooled (pooled)", "free (none)", "ceiling", "codec", "floor"]
    assert [row["model"] for row in rows] == names  # the prior alone does not reconstruct
    metrics = json.loads((output / "pooled" / "metrics.json").read_text())["rows"]
    cosine, best = (metrics[row]["spatial_cosine"]["mean"] for row in ("reconstruction", "best"))
    assert rows[1]["cosine"].startswith(f"{cosine:.3f} [") and best >= cosine
    assert rows[1]["best of S"].startswith(f"{best:.3f} [")
    assert rows[3]["relative L2"].startswith(f"{metrics['ceiling']['relative_l2']['mean']:.3f} [")
    page = (output / "table.md").read_text()
    assert "3 images, 2 sample(s) each, seed 0" in page
    assert "Made by `python experiments/reconstruction.py " in page


def test_it_goes_on_with_what_is_missing(made, experiment, tmp_path):
    rows, output, command = made
    shutil.copytree(output, tmp_path / "out")
    kept, missing = (tmp_path / "out" / name / "metrics.json" for name in ("spatial", "pooled"))
    before = kept.stat().st_mtime_ns
    missing.unlink()
    again = experiment("reconstruction", *command, output=tmp_path / "out")
    assert kept.stat().st_mtime_ns == before and missing.is_file()
    for row in (*rows, *again):
        del row["s per image"]
    assert again == rows


@pytest.mark.parametrize("value", ["num_samples=1", "seed=3", "sampler.num_steps=3"])
def test_results_of_other_settings_are_not_mixed(value, made, refusal):
    _, output, command = made
    said = refusal("reconstruction", *command, value, f"output={output}")
    assert "was made with" in said and "expected another folder" in said


def test_the_scores_of_other_weights_are_not_taken(made, tiny, refusal, tmp_path):
    _, output, _ = made
    shutil.copytree(tiny("pooled"), tmp_path / "spatial")
    command = [f"checkpoints=[{tmp_path / 'spatial'}]", *PHOTOS, f"output={output}"]
    assert "was made with weights=" in refusal("reconstruction", *command)


def test_the_table_goes_to_wandb(made, experiment, tmp_path, monkeypatch):
    _, output, command = made
    shutil.copytree(output, tmp_path / "out")
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = experiment("reconstruction", *command, "wandb=true", output=tmp_path / "out", kept=True)
    (table,) = (tmp_path / "out" / "wandb").rglob("reconstruction*.table.json")
    sent = json.loads(table.read_text())
    assert [dict(zip(sent["columns"], row, strict=True)) for row in sent["data"]] == rows


def test_priors_alone_are_nothing_to_score(tiny, refusal):
    assert refusal("reconstruction", f"checkpoints=[{tiny('prior')}]", *PHOTOS).endswith(
        "only priors."
    )
