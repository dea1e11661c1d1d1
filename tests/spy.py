"""A callback that tells the tests what each rank did; imported by the commands that they start."""

from pathlib import Path

import lightning as L
import torch


class Spy(L.Callback):
    """Writes down the samples, gradients and number of steps of a rank, and what its DDP handles.

    Args:
        folder: Where to write `spy-RANK.pt`, when training ends.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.samples, self.validated, self.gradients = [], [], []

    def on_train_start(self, trainer, model) -> None:
        self.reduced, self.buffers, self.ignored = [], [], []
        if trainer.world_size > 1:
            ddp = trainer.strategy.model
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            self.reduced = [names[id(parameter)] for parameter in ddp._module_parameters]
            self.buffers = list(ddp.named_module_buffers)
            self.ignored = sorted(ddp.parameters_to_ignore)

    def on_train_batch_start(self, trainer, model, batch, *args) -> None:
        self.samples.append(batch["index"].tolist())

    def on_validation_batch_start(self, trainer, model, batch, *args) -> None:
        self.validated.append(batch["index"].tolist())

    def on_before_optimizer_step(self, trainer, model, *args) -> None:
        trained = model.trained().named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in trained if p.grad is not None})

    def on_train_end(self, trainer, model) -> None:
        names = ("samples", "validated", "gradients", "reduced", "buffers", "ignored")
        seen = {name: getattr(self, name) for name in names}
        torch.save(seen, self.folder / f"spy-{trainer.global_rank}.pt")
