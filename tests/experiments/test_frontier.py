from frontier import frontier_figure
from harness import layers_caption

PHOTOS = ["data.crops_per_photo=2", "num_images=6", "witnesses=[]", "extractors=[lite0]"]


def test_plain_and_guided_stand_side_by_side(tiny, experiment, tmp_path):
    guided = f"{{checkpoint: {tiny('spatial')}, sampler: {{feature_guidance_scale: 5}}}}"
    free = f"{{checkpoint: {tiny('prior')}, sampler: {{feature_guidance_scale: 5}}}}"
    methods = f"plain: {{checkpoint: {tiny('spatial')}}}, hybrid: {guided}, training-free: {free}"
    # The default methods refer to these two.
    own = ["~checkpoint", "~prior", "~methods", f"+methods={{{methods}}}"]
    rows = experiment("frontier", *own, *PHOTOS, output=tmp_path)
    assert [row["method"] for row in rows] == ["plain", "hybrid", "training-free"]
    cosine = [float(row["cosine"].split()[0]) for row in rows]
    assert cosine[1] > cosine[0], "guidance brings the features closer"
    assert all(row["kid_lite0"] for row in rows)
    assert (tmp_path / "frontier_lite0.png").is_file()


def test_cosines_of_several_layers_are_said_not_to_compare():
    layers = ("layer2", "layer4")
    results = {layer: {"backbone": "resnet10t", "layer": layer} for layer in layers}
    assert layers_caption({"one": results["layer2"]}) == "Backbone resnet10t, layer layer2."
    assert layers_caption(results) == (
        "Backbone resnet10t, layer layer2; resnet10t, layer layer4. "
        "Cosines of different layers do not compare."
    )


def test_a_model_without_a_witness_is_left_out_of_its_figure():
    metrics = {
        "rows": {"reconstruction": {"spatial_cosine": {"mean": 0.5}}},
        "seconds_per_reconstruction": 1.0,
        "sets": {"lite2": {"reconstruction": {"kid": 0.1}}},
    }
    results = {"a": metrics, "b": metrics | {"sets": {}}, "c": metrics}
    figure = frontier_figure(results, "lite2")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["1  a, 1.0 s", "3  c, 1.0 s"]  # numbered as the table's rows
