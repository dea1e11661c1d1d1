import csv

import pytest
from helpers import mistake, run, tiny_run
from hydra import compose, initialize_config_dir
from PIL import Image

from experiments import frontier
from experiments.harness import find_methods
from featinv.checkpoints import SHIPPED
from featinv.cli.app import CONFIGS
from featinv.evaluation.set_metrics import Extractor
from featinv.sampling import SamplerConfig

DATA = ["data=photos", "data.crops_per_photo=2", "num_images=6", "extractors=[lite0]"]


def methods(run: str, prior: str) -> str:
    """Return a smaller choice than the default one."""
    guided = "feature_guidance_scale: 0.05, feature_guidance_iterations"
    return (
        f"methods={{plain: {{checkpoint: '{run}'}}, "
        f"hybrid weak: {{checkpoint: '{run}', sampler: {{{guided}: 1}}}}, "
        f"hybrid strong: {{checkpoint: '{run}', sampler: {{{guided}: 4}}}}, "
        f"training-free: {{checkpoint: '{prior}', sampler: {{forward_guidance_scale: 1}}}}}}"
    )


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    prior = tiny_run("conditioning=none")
    wanted = ["~methods", f"+{methods(tiny_run(), prior)}"]
    return [f"checkpoint={tiny_run()}", f"prior={prior}", *wanted, *DATA, f"output={tmp_path}"]


def test_plain_guided_and_hybrid_stand_side_by_side(tmp_path, overrides, monkeypatch):
    look = Extractor.__call__  # three features: six images are enough
    monkeypatch.setattr(
        Extractor, "__call__", lambda extractor, images: look(extractor, images)[:, :3]
    )
    run("frontier", *overrides, task=frontier.main)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["plain", "hybrid weak", "hybrid strong", "training-free"]
    assert [row["method"] for row in rows] == names
    cosine = [float(row["spatial cosine"].split()[0]) for row in rows]
    assert cosine[2] > cosine[1] > cosine[0], "more guidance, nearer features"
    assert all(float(row["fd_lite0"]) >= 0 for row in rows)
    with Image.open(tmp_path / "frontier_lite0.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**7)) > 10
    # again: nothing is computed anew
    made = (tmp_path / "plain" / "metrics.json").stat().st_mtime_ns
    run("frontier", *overrides, task=frontier.main)
    assert (tmp_path / "plain" / "metrics.json").stat().st_mtime_ns == made


def test_few_images_are_compared_by_the_kernel_distance(tmp_path, overrides):
    run("frontier", *overrides, task=frontier.main)
    head = (tmp_path / "table.csv").read_text().splitlines()[0]
    assert "kid_lite0" in head and "fd_lite0" not in head
    assert (tmp_path / "frontier_lite0.png").exists()


def test_the_methods_of_the_config_are_those_of_the_table():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("frontier", ["data=photos"])
    found = find_methods(config)
    assert list(found)[:2] == ["plain", "hybrid forward"]
    assert found["training-free both"][0] == "imagenette-small-prior"
    assert found["hybrid both"][1]["forward_guidance_scale"] == 2
    for checkpoint, values in found.values():
        assert checkpoint in SHIPPED
        SamplerConfig(**values)  # refuses what does not fit


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("methods.plain.sampler={eta: -1}", "sampler.eta is -1 with scheduler"),
        ("methods.plain.checkpoint=nothing", "There is no checkpoint 'nothing'"),
        ("methods.plain.sampler={etta: 1}", "Unknown value of the method 'plain' 'etta'"),
    ],
)
def test_bad_input(override, sentence, overrides, capsys):
    assert sentence in mistake(capsys, "frontier", *overrides, f"++{override}", task=frontier.main)


def test_a_prior_without_guidance_is_refused(overrides, capsys):
    prior = f"++methods.plain.checkpoint={tiny_run('conditioning=none')}"
    said = mistake(capsys, "frontier", *overrides, prior, task=frontier.main)
    assert "'plain' is a prior without guidance" in said


def test_cosines_of_several_layers_are_not_compared(overrides, capsys):
    other = tiny_run("backbone.layer=layer3", "conditioning=spatial")
    said = mistake(
        capsys, "frontier", *overrides, f"++methods.plain.checkpoint={other}", task=frontier.main
    )
    assert "Several layers are inverted" in said and "resnet10t layer3" in said
