import pytest

from featinv import InputError
from harness import check_one_layer

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


def test_cosines_of_several_layers_are_not_compared():
    layers = ("layer2", "layer4")
    results = {layer: {"backbone": "resnet10t", "layer": layer} for layer in layers}
    with pytest.raises(InputError, match="several layers .*'layer2': 'resnet10t layer2'"):
        check_one_layer(results)
    check_one_layer({"one": results["layer2"]})
