import threading

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from featinv.evaluation.figures import reconstruction_figure, save_figure, save_png
from featinv.evaluation.plots import curves_figure
from featinv.metrics import pixel_spread
from featinv.utils.errors import InputError


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def rendered(figure) -> np.ndarray:
    FigureCanvasAgg(figure).draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def cell(figure, number: int) -> np.ndarray:
    """Return the rendered pixels of one axes."""
    box = figure.axes[number].bbox
    left, right = round(box.x0), round(box.x1)
    pixels = rendered(figure)
    top, bottom = len(pixels) - round(box.y1), len(pixels) - round(box.y0)
    return pixels[top:bottom, left:right]


@pytest.mark.parametrize("num_samples", [1, 3])
def test_reconstructions_are_drawn_pixel_for_pixel(num_samples):
    originals, samples = pictures(2, 3, 64, 64), pictures(2, num_samples, 3, 32, 32)
    figure = reconstruction_figure(
        torch.from_numpy(originals),
        torch.from_numpy(samples),
        torch.full((2, num_samples), -0.123),
        rows=["key $1\ntrue class $2", "ILSVRC2012_val_00012345\nAmerican egret, great white"],
        title="a title that is long enough to be wrapped where there are few samples only",
        calibration="calibration 0.75 [0.71, 0.78]",
        ratios=[0.5, 0.7],
    )
    several = num_samples > 1  # else there is no spread
    columns = 1 + num_samples + several
    assert len(figure.axes) == 2 * columns
    for n in range(2):
        for number, picture in enumerate([originals[n], *samples[n]], start=n * columns):
            drawn = cell(figure, number)
            scale = drawn.shape[0] // picture.shape[1]
            naive = np.kron(picture.transpose(1, 2, 0), np.ones((scale, scale, 1), np.uint8))
            assert np.array_equal(drawn, naive)
    pixels = rendered(figure)
    edges = pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]
    assert all((edge == 255).all() for edge in edges), "text is cut off"
    texts = {text.get_text().replace("\n", " ") for ax in figure.axes for text in ax.texts}
    assert {"original", "sample 1", "cosine -0.123"} < texts
    spread = pixel_spread(torch.from_numpy(samples) / 127.5)
    expected = {f"spread, up to {spread.max():.2f} calibration 0.75 [0.71, 0.78]"}
    for heat, ratio in zip(spread, ("0.50", "0.70"), strict=True):
        expected.add(f"mean {heat.mean():.3f} calibration {ratio}")
    assert texts & expected == (expected if several else set())


def test_heat_maps_share_one_scale():
    samples = torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8)
    samples[0, 1], samples[1, 1] = 51, 102
    figure = reconstruction_figure(
        torch.from_numpy(pictures(2, 3, 8, 8)), samples, torch.ones(2, 2)
    )
    heats = [np.asarray(figure.axes[n].images[0].get_array()) for n in (3, 7)]
    for heat, value in zip(heats, (0.5, 1.0), strict=True):
        expected = matplotlib.colormaps["inferno"](value, bytes=True)[:3]
        assert np.allclose(heat, expected, atol=2)
    assert figure.axes[3].texts[0].get_text() == "spread, up to 0.28"  # 0.4 / sqrt(2)


def test_curves_go_to_their_panels_and_long_ones_are_smoothed():
    noisy = [(step, float(step % 2)) for step in range(100)]
    history = {
        "train/loss": noisy,
        "val/cosine": [(2, 0.5), (1, 0.25)],
        "lr": [(0, 1.0)],
        "loss": [],
    }
    loss, cosine = curves_figure(history, title="run").axes
    smooth, raw = loss.lines
    assert np.array_equal(raw.get_ydata(), [value for _, value in noisy])
    naive = [np.mean([noisy[i][1] for i in range(n - 2, n + 2)]) for n in range(2, 98)]
    assert np.allclose(smooth.get_ydata()[2:98], naive)
    (line,) = cosine.lines
    assert line.get_xydata().tolist() == [[1, 0.25], [2, 0.5]]
    assert len(curves_figure({}).axes) == 2


def test_figures_are_saved_whole_in_new_folders_and_outside_the_main_thread(tmp_path):
    path = tmp_path / "new" / "folder" / "curves.pdf"
    thread = threading.Thread(target=lambda: save_figure(curves_figure({}), path))
    thread.start()
    thread.join()
    before = path.read_bytes()
    assert before.startswith(b"%PDF")
    figure = curves_figure({})
    figure.savefig = lambda file, **_: file.write(b"half") and 1 / 0
    with pytest.raises(ZeroDivisionError):
        save_figure(figure, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_paths_that_cannot_be_written_are_input_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write '.*file/image.png'"):
        save_png(torch.zeros(3, 2, 2, dtype=torch.uint8), tmp_path / "file" / "image.png")
