import lightning as L
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from featinv import InputError
from featinv.metrics import spatial_cosine
from featinv.training.checkpointing import SaveLast
from featinv.training.ema import EMA
from featinv.training.progress import ProgressBar, StepClock
from featinv.training.sample_grid import SampleGrid
from featinv.utils.pixels import eight_bit, from_uint8, resize, to_uint8


def pictures(number: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return [{"image": images[i], "index": i} for i in range(number)]


def make_trainer(folder, *callbacks: L.Callback, **options) -> L.Trainer:
    defaults = {"max_steps": 4, "logger": False, "check_val_every_n_epoch": None}
    return L.Trainer(
        **defaults | options,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, SaveLast) for c in callbacks),
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.trained().state_dict().items()}


class Recorder(L.Callback):
    """Keeps the trained weights after every optimiser step, and those that validation sees."""

    def __init__(self) -> None:
        self.steps, self.validations, self.after = [], [], []

    def on_train_batch_end(self, trainer, model, *args) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(weights(model))

    def on_validation_batch_end(self, trainer, model, *args) -> None:
        self.validations.append(weights(model))

    def on_train_batch_start(self, trainer, model, *args) -> None:
        self.after.append(weights(model))


def naive_average(steps: list[dict], decay: float) -> dict[str, torch.Tensor]:
    average = steps[0]
    for n, step in enumerate(steps[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = {key: d * average[key] + (1 - d) * step[key] for key in average}
    return average


# The average


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("decay", [0.25, 0.999])  # with 0.25 the warm-up ends within the run
def test_the_average_is_that_of_a_naive_loop(tiny_model, tmp_path, decay, accumulate):
    recorder, ema = Recorder(), EMA(decay)
    trainer = make_trainer(tmp_path, ema, recorder, accumulate_grad_batches=accumulate)
    trainer.fit(tiny_model, DataLoader(pictures(2 * 4 * accumulate), batch_size=2))
    assert len(recorder.steps) == 4
    assert int(ema.average.n_averaged) == 4
    expected = naive_average(recorder.steps, decay)
    torch.testing.assert_close(ema.state_dict()["weights"], expected)
    torch.testing.assert_close(weights(tiny_model), expected)  # stays in the model
    changed = sum(not torch.equal(expected[key], recorder.steps[-1][key]) for key in expected)
    assert changed > 50


def test_validation_sees_the_average_and_training_goes_on_without_it(tiny_model, tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, EMA(0.5), recorder, val_check_interval=2)
    data = DataLoader(pictures(8), batch_size=2)
    trainer.fit(tiny_model, data, DataLoader(pictures(1)))
    first, second = recorder.validations
    torch.testing.assert_close(first, naive_average(recorder.steps[:2], 0.5))
    torch.testing.assert_close(second, naive_average(recorder.steps, 0.5))
    torch.testing.assert_close(recorder.after[2], recorder.steps[1], rtol=0, atol=0)
    assert not torch.equal(first["unet.conv_in.bias"], recorder.steps[1]["unet.conv_in.bias"])


def test_only_trained_modules_are_copied(tiny_model):
    ema = EMA()
    ema.setup(None, tiny_model, "fit")
    assert ema.state_dict()["weights"].keys() == tiny_model.trained().state_dict().keys()
    copied = {id(module) for module in ema.average.modules()}
    assert not copied & {id(module) for module in tiny_model.modules()}
    assert not any(parameter.requires_grad for parameter in ema.average.parameters())


def test_the_average_comes_back_from_a_checkpoint(tiny_model):
    ema, other = EMA(), EMA()
    for each in (ema, other):
        each.setup(None, tiny_model, "fit")
    for _ in range(3):
        tiny_model.unet.conv_in.bias.data += 1
        ema.average.update_parameters(tiny_model.trained())
    other.load_state_dict(ema.state_dict())
    for each in (ema, other):  # the next step depends on how many there were
        each.average.update_parameters(tiny_model.trained())
    torch.testing.assert_close(other.state_dict(), ema.state_dict())
    assert other.state_dict()["num_averaged"] == 4


def test_validation_without_training_leaves_the_model_alone(tiny_model, tmp_path):
    before = weights(tiny_model)
    make_trainer(tmp_path, EMA()).validate(tiny_model, DataLoader(pictures(1)), verbose=False)
    torch.testing.assert_close(weights(tiny_model), before, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [-0.1, 1, 2])
def test_a_decay_out_of_range(decay):
    with pytest.raises(InputError, match=f"ema.decay is {decay}, expected 0 or more and less"):
        EMA(decay)


# Sample grids


def grid_values(model, folder, number: int, batch_size: int) -> tuple[dict, torch.Tensor]:
    callback = SampleGrid(folder, num_images=3, num_steps=2)
    trainer = make_trainer(folder, callback)
    trainer.validate(model, DataLoader(pictures(number), batch_size=batch_size), verbose=False)
    with Image.open(folder / "step_0000000.png") as grid:
        pixels = torch.tensor(list(grid.getdata()), dtype=torch.uint8)
        return trainer.callback_metrics, pixels.view(grid.height, grid.width, 3)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_sample_grid_values_are_those_of_a_naive_loop(tiny_model, tmp_path, batch_size):
    for parameter in tiny_model.controlnet.parameters():
        parameter.data += 0.1  # so that the condition matters
    values, _ = grid_values(tiny_model, tmp_path, 5, batch_size)
    images = torch.stack([from_uint8(item["image"]) for item in pictures(3)])
    own, other = [], []
    features = [tiny_model.backbone.features(image[None]) for image in images]
    drawn = []
    for i in range(3):
        samples = tiny_model.invert(features[i], num_steps=2, seed=0, indices=[i])
        drawn.append(tiny_model.backbone.features(eight_bit(samples[:, 0])))
    for i in range(3):
        own.append(spatial_cosine(features[i], drawn[i]))
        other.append(spatial_cosine(features[i], drawn[i - 1]))
    assert float(values["val/feature_cosine"]) == pytest.approx(float(sum(own) / 3), abs=1e-5)
    shuffled = float(values["val/feature_cosine_shuffled"])
    assert shuffled == pytest.approx(float(sum(other) / 3), abs=1e-5)
    assert float(sum(own)) != pytest.approx(float(sum(other)), abs=1e-4)


def test_the_grid_shows_originals_above_reconstructions(tiny_model, tmp_path):
    _, grid = grid_values(tiny_model, tmp_path, 3, 3)
    images = torch.stack([from_uint8(item["image"]) for item in pictures(3)])
    features = tiny_model.backbone.features(images)
    rows = [resize(images, 32), tiny_model.invert(features, num_steps=2)[:, 0]]
    assert grid.shape == (2 + 2 * 34, 2 + 3 * 34, 3)
    for y, row in enumerate(rows):
        for x, image in enumerate(to_uint8(row)):
            cell = grid[2 + 34 * y : 34 + 34 * y, 2 + 34 * x : 34 + 34 * x]
            torch.testing.assert_close(cell, image.permute(1, 2, 0))


def test_the_grid_of_a_prior_has_no_cosine(tiny_config, tmp_path):
    from featinv.checkpoints import build_model

    model = build_model({**tiny_config, "conditioning": "none"})
    values, grid = grid_values(model, tmp_path, 3, 3)
    assert set(values) == {"val/loss"}
    assert grid.shape == (70, 104, 3)


@pytest.mark.parametrize(("name", "value"), [("num_images", 1), ("num_steps", 0)])
def test_sample_grid_values_out_of_range(tmp_path, name, value):
    with pytest.raises(InputError, match=f"sample_grid.{name} is {value}"):
        SampleGrid(tmp_path, **{name: value})


# Checkpoints


def test_checkpoints_are_saved_every_so_many_optimiser_steps_and_at_the_end(tiny_model, tmp_path):
    saves = []

    class Watched(SaveLast):
        def _save(self, trainer) -> None:
            saves.append(trainer.global_step)
            super()._save(trainer)

    path = tmp_path / "folder" / "last.ckpt"
    trainer = make_trainer(tmp_path, Watched(str(path), 2), max_steps=5, accumulate_grad_batches=2)
    trainer.fit(tiny_model, DataLoader(pictures(10)))
    assert saves == [2, 4, 5]
    assert torch.load(path, weights_only=True)["global_step"] == 5
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_a_save_every_zero_steps():
    with pytest.raises(InputError, match="save_last.every_n_steps is 0"):
        SaveLast("last.ckpt", 0)


# Small ones


def test_the_step_clock_sets_the_step_of_the_logs(tiny_model, tmp_path):
    class Wrong(L.Callback):
        def on_train_start(self, trainer, *args) -> None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = 7

    class Steps(L.Callback):
        seen = []

        def on_train_batch_start(self, trainer, *args) -> None:
            self.seen.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    trainer = make_trainer(tmp_path, StepClock(), Wrong(), Steps(), max_steps=3)
    trainer.fit(tiny_model, DataLoader(pictures(3)))
    assert Steps.seen == [0, 1, 2]


def test_the_progress_bar_counts_batches(tmp_path):
    bar = ProgressBar()
    bar.setup(make_trainer(tmp_path), None, "fit")
    assert bar.init_train_tqdm().unit == "batch"
