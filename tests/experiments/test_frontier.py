import pytest

PHOTOS = ["data.crops_per_photo=2", "num_images=6", "witnesses=[]", "extractors=[lite0]"]


@pytest.fixture
def command(tiny) -> list[str]:
    """A smaller choice than the default one."""
    guided = f"{{checkpoint: {tiny('spatial')}, sampler: {{feature_guidance_scale: 5}}}}"
    free = f"{{checkpoint: {tiny('prior')}, sampler: {{feature_guidance_scale: 5}}}}"
    methods = f"plain: {{checkpoint: {tiny('spatial')}}}, hybrid: {guided}, training-free: {free}"
    own = [f"checkpoint={tiny('spatial')}", f"prior={tiny('prior')}"]
    return [*own, "~methods", f"+methods={{{methods}}}", *PHOTOS]


def test_plain_guided_and_hybrid_stand_side_by_side(command, experiment, tmp_path, monkeypatch):
    # `~methods` takes the default methods away, which read these two
    command = [value for value in command if not value.startswith(("checkpoint=", "prior="))]
    rows = experiment("frontier", *command, "~checkpoint", "~prior", output=tmp_path)
    assert [row["method"] for row in rows] == ["plain", "hybrid", "training-free"]
    cosine = [float(row["cosine"].split()[0]) for row in rows]
    assert cosine[1] > cosine[0], "guidance leads to nearer features"
    assert all(row["kid_lite0"] for row in rows)
    assert (tmp_path / "frontier_lite0.png").is_file()


def test_a_prior_without_guidance_is_refused(command, tiny, refusal):
    said = refusal("frontier", *command, f"++methods.plain.checkpoint={tiny('prior')}")
    assert said.startswith("'plain' is a prior without feature guidance")


def test_cosines_of_several_layers_are_not_compared(command, tiny, refusal):
    said = refusal("frontier", *command, f"++methods.plain.checkpoint={tiny('middle')}")
    assert said.startswith("Several layers are inverted") and "resnet10t layer2" in said
