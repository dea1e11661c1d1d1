"""Shared by the entry points: the config, sweeps, and errors in one sentence."""

import inspect
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from featinv.analysis.probe import Probe
from featinv.checkpoints import load_model
from featinv.cli.sweeps import jobs_listed, run_job
from featinv.cli.user_errors import report_user_errors
from featinv.cli.values import check_types
from featinv.data.base import Loader, RankShare
from featinv.data.folder import list_images
from featinv.data.images import eval_view
from featinv.data.pictures import EvalPictures
from featinv.evaluation import report
from featinv.evaluation.evaluator import Evaluator
from featinv.evaluation.tables import text_frame
from featinv.models.base import Inverter
from featinv.training.loggers import finish_wandb, make_wandb_logger
from featinv.utils.devices import keep_freed_memory, pick_device
from featinv.utils.errors import at_least

log = logging.getLogger("evaluate")

PACKAGE = Path(__file__).parents[1]
# Inside the package if installed from a wheel, next to it in a checkout.
CONFIGS = next(p / "configs" for p in (PACKAGE, PACKAGE.parent) if (p / "configs").is_dir())


def _run_folder(resume: str | None, output: str) -> str:
    """Return the folder of the run to resume, if there is one, or else `output`."""
    named = resume and resume != "auto"  # "auto" resumes the run in `output`
    return resume if named and (Path(resume) / "config.yaml").is_file() else output


def _method(model: DictConfig) -> str:
    """Return the prefix of a run's folder: empty for a ControlNet on a frozen UNet."""
    name = model._target_.rpartition(".")[2]
    if name != "FeatInv":
        return f"{name.lower()}_"
    return "joint_" if model.train_unet else ""


for _name, _section in OmegaConf.load(CONFIGS / "experiments.yaml").items():
    ConfigStore.instance().store(_name, _section)  # as if each were a file
OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
OmegaConf.register_new_resolver("method", _method, replace=True)


def run_entry_point(task: Callable[[DictConfig], None], config_name: str) -> None:
    """Run a task on the config of the command line, or once for each job of a sweep.

    Bad input ends in one sentence without a traceback, and exit code 2.

    Args:
        task: Takes the config; must be defined in the entry point's file.
        config_name: Name of the config in `CONFIGS`, or its path there.
    """
    _silence_noise()
    keep_freed_memory()
    # Make Hydra raise errors instead of printing them and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    file = CONFIGS / config_name

    @hydra.main(version_base=None, config_path=str(file.parent), config_name=file.name)
    @wraps(task)
    def main(config: DictConfig) -> float | None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return run_job(config, program(Path(inspect.getfile(task))))
        folder = HydraConfig.get().runtime.output_dir
        if Path(config.output).absolute() != Path(folder):  # a resumed run
            config.output = folder
        with report_user_errors():  # here too, or Hydra would add lines to the error
            check_types(config)
            task(config)

    with report_user_errors(), jobs_listed():
        main()


def program(file: Path) -> list[str]:
    """Return Python's arguments to run a file: a module of this package, or a script."""
    if file.is_relative_to(PACKAGE):
        return ["-m", ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)]
    return [os.path.relpath(file)]


def command() -> str:
    """Return the command that started this job, to save with its results."""
    file = Path(sys.argv[0]).absolute()
    words = ["python", *program(file)] if file.suffix == ".py" else [file.name]
    return shlex.join([*words, *HydraConfig.get().overrides.task])


def sampler_options(config: DictConfig) -> dict:
    """Return the values set in the config group `sampler`, as options of `Inverter.invert`."""
    given = config.sampler.items()
    return {name: value for name, value in given if value is not None and name != "_target_"}


def open_model(checkpoint: str, config: DictConfig) -> Inverter:
    """Return a model in eval mode on the config's device, set to the config's layer and probe."""
    model = load_model(checkpoint).to(pick_device(config.device))
    if config.get("layer") is not None:
        model.backbone.use_layer(config.layer)
    if config.probe is not None:
        Probe.load(config.probe).attach(model.backbone)
    return model


def make_batches(config: DictConfig, model: Inverter) -> Iterable[dict]:
    """Return the batches of the config's data set or image files."""
    size = max(model.image_size, model.backbone.image_size)
    if config.images is not None:
        pictures, view = list_images(config.images), partial(eval_view, size=size)
        share, positions = RankShare(0, 1), range(len(pictures))
        return Loader(EvalPictures(pictures, view, share, positions), batch_size=8)
    size = config.data.image_size or size
    if config.num_images is not None:
        at_least("num_images", config.num_images, 1)
    data = instantiate(config.data, image_size=size, max_images=config.num_images)
    return data.test_dataloader()


def make_evaluation(config: DictConfig, model: Inverter) -> Evaluator:
    """Return the evaluator of a model that the config describes."""
    names = ("num_samples", "seed", "batch_size", "num_pictures", "precision")
    names += ("extractors", "lpips", "witnesses")
    options = {name: config[name] for name in names}
    return Evaluator(model, sampler=sampler_options(config), **options)


def run_evaluation(
    evaluator: Evaluator, batches: Iterable[dict], folder: str, first: bool = True, **about: object
) -> list[dict[str, str]]:
    """Score a model, save the results and print the table; return its rows.

    What was computed is saved even if the data turn out to be broken.

    Args:
        evaluator: Of the model.
        batches: Of a data module.
        folder: Where to write.
        first: Whether this rank is the one that saves and prints.
        **about: Further entries of `metrics.json`.
    """
    try:
        evaluator.run(batches)
    finally:
        if evaluator.keys and first:
            evaluator.save(folder, command(), **about)
            log.info("Table, numbers and picture are in %s", folder)
    metrics = evaluator.metrics()
    if first:
        print(f"\n{report.page(metrics)}")
    return report.table_rows(metrics)


def log_table(rows: Sequence[Mapping[str, str]], config: DictConfig) -> None:
    """Log a table to Weights & Biases if `config.wandb`; offline without a key."""
    if not config.wandb:
        return
    name = HydraConfig.get().job.name
    logger = make_wandb_logger(config.output, project="featinv", job_type=name)
    logger.log_table(name, dataframe=text_frame(rows))
    finish_wandb(failed=False)


def _silence_noise() -> None:
    """Hide tips and warnings that do not concern the user."""
    # INFO lines: Lightning's tips, advertisements and unused devices; each file that timm loads.
    for package in ("lightning.pytorch", "lightning.fabric", "timm"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in (
        r".*in eval mode at the start of training",  # frozen modules, on purpose
        r".*isinstance\(treespec, LeafSpec\)",  # of Lightning's own use of torch
        r".*all_gather is deprecated",  # likewise
        r".*your dataloader is not resumable",  # the data modules resume by themselves
        r".*does not have many workers",  # on purpose: data in memory needs none
    ):
        warnings.filterwarnings("ignore", message)
