import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
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


def test_the_progress_bar_of_a_resumed_training_counts_all_batches(tmp_path):
    def train(steps: int, checkpoint: str | None) -> L.Trainer:
        bar = ProgressBar()
        quiet = {"logger": False, "enable_model_summary": False, "default_root_dir": tmp_path}
        trainer = L.Trainer(max_steps=steps, limit_train_batches=4, callbacks=[bar], **quiet)
        trainer.fit(BoringModel(), ckpt_path=checkpoint, weights_only=True)
        return trainer

    train(3, None).save_checkpoint(tmp_path / "three.ckpt")
    bar = train(4, tmp_path / "three.ckpt").progress_bar_callback.train_progress_bar
    assert (bar.unit, bar.initial, bar.n, bar.total) == ("batch", 3, 4, 4)
