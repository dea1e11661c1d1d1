import pytest
from data.conftest import make_shards

from featinv.codecs import PatchPCA
from fit_codec import ceiling


def test_what_codecs_keep_and_cost(experiment, tmp_path):
    make_shards(tmp_path, "imagenette-train", [4, 1, 1, 1, 1, 1, 1, 3])
    own = [f"data.root={tmp_path}", "backbone=resnet10t_random", "num_images=8", "num_held_out=3"]
    tried = ["~tried", "+tried={8: [4]}", "timed_steps=1"]
    rows = experiment("fit_codec", *own, *tried, output=tmp_path / "out")
    assert [row["components"] for row in rows] == ["3", "4"]
    assert rows[1]["numbers per image"] == "1,024"  # 4 x 16 x 16
    cosine = [float(row["cosine"]) for row in rows]
    assert cosine[1] <= cosine[0]
    basis = tmp_path / "out" / "patch_pca_8.safetensors"
    assert PatchPCA(64, basis=str(basis)).latent_shape(128) == (64, 16, 16)
    assert "8 images to fit to, 3 others" in (tmp_path / "out" / "table.md").read_text()


def test_without_a_codec_only_resizing_lowers_the_ceiling(model, images):
    whole = ((images + 1) * 127.5).round().byte().repeat(1, 1, 4, 4)  # 128 px: nothing to resize
    assert ceiling(model.backbone, whole, None) == pytest.approx(1)
