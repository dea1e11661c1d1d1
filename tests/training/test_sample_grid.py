import pytest
import torch
from PIL import Image
from training.conftest import make_trainer, pictures

from featinv.checkpoints import build_model
from featinv.metrics import spatial_cosine
from featinv.training.sample_grid import SampleGrid
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8


def grid_values(model, folder, number: int, batch_size: int) -> tuple[dict, torch.Tensor]:
    callback = SampleGrid(folder, num_images=3, num_steps=2)
    trainer = make_trainer(folder, callback)
    trainer.validate(model, pictures(number, batch_size), verbose=False)
    with Image.open(folder / "step_0000000.png") as grid:
        pixels = torch.tensor(list(grid.getdata()), dtype=torch.uint8)
        return trainer.callback_metrics, pixels.view(grid.height, grid.width, 3)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_values_and_pictures_match_a_naive_loop(awake_model, tmp_path, batch_size):
    values, grid = grid_values(awake_model, tmp_path, 5, batch_size)
    images = torch.stack([from_uint8(batch["image"][0]) for batch in pictures(3)])
    features = [awake_model.backbone.features(image[None]) for image in images]
    drawn = [awake_model.invert(features[i], num_steps=2, seed=0, indices=[i])[0] for i in range(3)]
    seen = [awake_model.backbone.features(eight_bit(image)) for image in drawn]
    own = sum(float(spatial_cosine(features[i], seen[i])) for i in range(3)) / 3
    other = sum(float(spatial_cosine(features[i], seen[i - 1])) for i in range(3)) / 3
    assert float(values["val/feature_cosine"]) == pytest.approx(own, abs=1e-5)
    assert float(values["val/feature_cosine_shuffled"]) == pytest.approx(other, abs=1e-5)
    assert own != pytest.approx(other, abs=1e-4)

    assert grid.shape == (2 + 2 * 34, 2 + 3 * 34, 3)  # originals above reconstructions
    for y, row in enumerate((resize(images, 32), torch.cat(drawn))):
        for x, image in enumerate(to_uint8(row)):
            cell = grid[2 + 34 * y : 34 + 34 * y, 2 + 34 * x : 34 + 34 * x]
            assert (cell.int() - image.permute(1, 2, 0).int()).abs().max() <= 1


def test_the_grid_of_a_prior_has_no_cosine(tiny_config, tmp_path):
    model = build_model({**tiny_config, "conditioning": "none"})
    values, grid = grid_values(model, tmp_path, 3, 3)
    assert set(values) == {"val/loss"}
    assert grid.shape == (70, 104, 3)
