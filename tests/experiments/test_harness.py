import time

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import harness
from drawing import first_of_each_class, in_chunks, select
from featinv.evaluation.draws import draw
from featinv.metrics import bootstrap_interval


def test_images_are_processed_in_chunks_of_as_many_samples_as_fit():
    config = OmegaConf.create({"batch_size": 6, "num_samples": 3})
    images = {"index": torch.arange(5), "key": list("abcde"), "photograph": list("xxyyz")}
    sizes = []

    def square(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes.append(len(rows))
        return {"square": rows.square()}

    found = in_chunks(images, config, square)
    assert sizes == [2, 2, 1] and found["square"].tolist() == [0, 1, 4, 9, 16]
    assert found["photograph"].tolist() == [0, 0, 1, 1, 2]
    chosen = select(images, torch.tensor([3, 0]))
    assert chosen["index"].tolist() == [3, 0] and chosen["key"] == ["d", "a"]


def test_the_first_of_each_class_is_picked():
    def batches(*labels: list[int]):
        for start, own in enumerate(labels):
            numbers = torch.arange(len(own)) + 10 * start
            yield {"label": torch.tensor(own), "index": numbers, "key": [f"k{n}" for n in numbers]}

    labels = [4, 4, 1], [4, 7, 1], [2, 2, 9]
    assert first_of_each_class(batches(*labels), 10)["index"].tolist() == [0, 2, 11, 20, 22]
    assert first_of_each_class(batches(*labels), 3)["index"].tolist() == [0, 2, 11]
    assert first_of_each_class(batches([-1, -1], [-1, -1]), 3)["key"] == ["k0", "k1", "k10"]


def test_different_names_have_different_files():
    names = ["a b", "a_b", "a+b", "a/b", "a%b", "ä"]
    assert len({harness.file_name(name) for name in names}) == len(names)
    assert harness.file_name("efficientnet_lite0-2.5") == "efficientnet_lite0-2.5"


def test_a_row_is_measured_once_and_again_only_if_it_depends_on_the_same(tmp_path):
    config = OmegaConf.create({"output": str(tmp_path), "num_pictures": 2})
    pictures = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    rows = {"a row": lambda: {"score": torch.arange(5.0), "drawn": pictures}}
    found = harness.measure(rows, {"seed": 0}, config)["a row"]
    assert found["score"].tolist() == [0, 1, 2, 3, 4] and len(found["drawn"]) == 2
    kept = harness.measure({"a row": lambda: {}}, {"seed": 0}, config)["a row"]
    assert torch.equal(kept["score"], found["score"])
    with pytest.raises(harness.InputError, match="was made with seed=0, not 1"):
        harness.measure(rows, {"seed": 1}, config)


def test_intervals_resample_photographs():
    """Crops of one photograph add no evidence: the interval is that of one crop of each."""
    values = torch.rand(8)
    crops = {
        "score": values.repeat_interleave(3),
        "photograph": torch.arange(8).repeat_interleave(3),
    }
    results = {"all": crops, "others": {"other": torch.ones(2)}}
    first, second = harness.interval_rows(results, {"score": "s", "other": "o"}, "name")
    low, high = bootstrap_interval(values)
    assert first == {"name": "all", "s": f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"}
    assert second == {"name": "others", "o": "1.000 [1.000, 1.000]"}


def test_a_figure_has_as_many_rows_as_its_shortest_column(tmp_path):
    def column(title: str, number: int) -> harness.Column:
        pictures = torch.full((number, 3, 16, 16), 255, dtype=torch.uint8)
        return harness.Column(title, pictures, ["caption"] * number)

    heights = []
    for number in (1, 3):
        path = tmp_path / f"{number}.png"
        harness.save_pictures([column("a", 5), column("b", number)], path)
        with Image.open(path) as picture:
            heights.append(picture.height)
    assert 2 < heights[1] / heights[0] < 4


def test_seconds_wait_for_the_draw_and_for_nothing_before(model, monkeypatch):
    monkeypatch.setattr("featinv.utils.devices.synchronize", lambda device: time.sleep(0.2))
    start = time.perf_counter()
    seconds = draw(model, torch.zeros(1, *model.backbone.feature_shape), [0], num_steps=1).seconds
    assert 0.2 <= seconds < time.perf_counter() - start - 0.2
