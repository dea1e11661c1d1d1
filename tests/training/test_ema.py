import lightning as L
import pytest
import torch
from training.conftest import make_trainer, pictures, weights

from featinv import InputError
from featinv.training.ema import EMA


class Recorder(L.Callback):
    """Keeps the trained weights after every optimiser step, and those that validation sees."""

    def __init__(self) -> None:
        self.steps, self.validations, self.starts = [], [], []

    def on_train_batch_start(self, trainer, model, *args) -> None:
        self.starts.append(weights(model))

    def on_train_batch_end(self, trainer, model, *args) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(weights(model))

    def on_validation_batch_end(self, trainer, model, *args) -> None:
        self.validations.append(weights(model))


def naive_average(steps: list[dict], decay: float) -> dict[str, torch.Tensor]:
    average = steps[0]
    for n, step in enumerate(steps[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = {key: d * average[key] + (1 - d) * step[key] for key in average}
    return average


# With 0.25 the warm-up ends within the run; the other one accumulates gradients.
@pytest.mark.parametrize(("decay", "accumulate"), [(0.25, 1), (0.999, 2)])
def test_the_average_is_that_of_a_naive_loop(tiny_model, tmp_path, decay, accumulate):
    """Validation sees it, training goes on without it, and in the end it stays in the model."""
    recorder, ema = Recorder(), EMA(decay)
    options = {"accumulate_grad_batches": accumulate, "val_check_interval": 2 * accumulate}
    trainer = make_trainer(tmp_path, ema, recorder, **options)
    trainer.fit(tiny_model, pictures(4 * accumulate), pictures(1))
    first, second = recorder.validations
    torch.testing.assert_close(first, naive_average(recorder.steps[:2], decay))
    torch.testing.assert_close(second, naive_average(recorder.steps, decay))
    torch.testing.assert_close(ema.state_dict()["weights"], second, rtol=0, atol=0)
    torch.testing.assert_close(weights(tiny_model), second, rtol=0, atol=0)
    torch.testing.assert_close(recorder.starts[2 * accumulate], recorder.steps[1], rtol=0, atol=0)
    changed = [not torch.equal(second[key], recorder.steps[-1][key]) for key in second]
    assert len(recorder.steps) == ema.state_dict()["num_averaged"] == 4 and sum(changed) > 50


def test_only_trained_weights_are_copied(tiny_model):
    ema = EMA()
    ema.setup(None, tiny_model, "fit")
    tensors = ema.state_dict()["weights"]
    assert tensors.keys() == tiny_model.trained().state_dict().keys()
    assert not any(tensor.requires_grad for tensor in tensors.values())
    own = {tensor.data_ptr() for tensor in tensors.values()}
    assert not own & {tensor.data_ptr() for tensor in tiny_model.state_dict().values()}


def test_the_average_comes_back_from_a_checkpoint(tiny_model):
    ema, other = EMA(0.9), EMA(0.9)
    for each in (ema, other):
        each.setup(None, tiny_model, "fit")
    for _ in range(3):
        tiny_model.unet.conv_in.bias.data += 1
        ema.average.step(tiny_model.trained().parameters())
    other.load_state_dict(ema.state_dict())
    for each in (ema, other):  # the next step depends on how many there were
        each.average.step(tiny_model.trained().parameters())
    torch.testing.assert_close(other.state_dict(), ema.state_dict(), rtol=0, atol=0)
    assert other.state_dict()["num_averaged"] == 4


def test_validation_without_training_leaves_the_model_alone(tiny_model, tmp_path):
    before = weights(tiny_model)
    make_trainer(tmp_path, EMA()).validate(tiny_model, pictures(1), verbose=False)
    torch.testing.assert_close(weights(tiny_model), before, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [-0.1, 1])
def test_a_decay_out_of_range(decay):
    with pytest.raises(InputError, match=f"ema.decay is {decay}, expected 0 or more and less"):
        EMA(decay)
