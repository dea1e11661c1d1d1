import multiprocessing
import subprocess

from data.conftest import indices_of
from data.test_pictures import folder_of
from featinv.data import FolderDataModule


def test_workers_survive_the_signals_sent_to_a_run(tmp_path):
    """Slurm and Ctrl-C signal every process; a run whose workers died could not save."""
    root = folder_of(tmp_path, "ab")
    module = FolderDataModule(root, image_size=8, batch_size=1, num_workers=1)
    before = set(multiprocessing.active_children())  # of tests in the same process
    batches = module.train_dataloader().__iter__()
    seen = [next(batches)]
    (worker,) = set(multiprocessing.active_children()) - before
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    # More than the worker has prepared already.
    seen += [next(batches) for _ in range(8)]
    assert indices_of(seen) == list(range(9)) and worker.is_alive()
    worker.terminate()  # the parent may
    worker.join(timeout=30)
    assert not worker.is_alive()
