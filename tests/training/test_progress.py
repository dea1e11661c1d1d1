import lightning as L
from training.conftest import make_trainer, pictures

from featinv.training.progress import ProgressBar, StepClock


def test_the_step_clock_sets_the_step_of_the_logs(tiny_model, tmp_path):
    class Wrong(L.Callback):
        def on_train_start(self, trainer, *args) -> None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = 7

    class Steps(L.Callback):
        seen = []

        def on_train_batch_start(self, trainer, *args) -> None:
            self.seen.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    trainer = make_trainer(tmp_path, StepClock(), Wrong(), Steps(), max_steps=2)
    trainer.fit(tiny_model, pictures(2))
    assert Steps.seen == [0, 1]


def test_the_progress_bar_counts_batches(tmp_path):
    bar = ProgressBar()
    bar.setup(make_trainer(tmp_path), None, "fit")
    assert bar.init_train_tqdm().unit == "batch"
