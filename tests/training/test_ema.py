import lightning as L
import pytest
import torch
from training.conftest import make_trainer, pictures, weights

from featinv import InputError
from featinv.training.ema import EMA


class Recorder(L.Callback):
    """Keeps the trained weights before and after every step, and those that validation sees."""

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
def test_the_average_matches_a_naive_loop(tiny_model, tmp_path, decay, accumulate):
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


def test_validation_without_training_leaves_the_model_alone(tiny_model, tmp_path):
    before = weights(tiny_model)
    make_trainer(tmp_path, EMA()).validate(tiny_model, pictures(1), verbose=False)
    torch.testing.assert_close(weights(tiny_model), before, rtol=0, atol=0)


def test_a_decay_out_of_range():
    with pytest.raises(InputError, match="ema.decay is 1, expected 0 or more and less than 1"):
        EMA(1)
