"""Sweeps: each job is a command with its own process and folder; a table lists their status.

Hydra's sweepers and launchers decide which jobs there are and where they start. They start each job
as its own command: with several devices, Lightning starts the other ranks by repeating the command,
and repeating the sweep's command would start the sweep again.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from featinv.checkpoints import LAST_FILE
from featinv.cli.values import quoted
from featinv.evaluation.tables import markdown_table
from featinv.training.loggers import curves

JOB_FILE = "job.json"  # in a job's folder: its overrides and status
TABLE_FILE = "jobs.md"  # in the sweep's folder
OBJECTIVE = "val/feature_cosine"  # what Optuna maximises
NAME_LENGTH = 120  # Weights & Biases takes names up to 128 characters
# The line of a process's stderr that names its error.
ERROR_LINE = r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)(?:: .*)?)$"
# Flags that pass a command's config directories on to its jobs, by Hydra's provider.
CONFIG_FLAGS = {"main": "--config-path", "command-line": "--config-dir"}


def job_folder(overrides: str) -> str:
    """Return the name of a job's folder, which needs no quotes in a shell or for Hydra.

    Args:
        overrides: `${hydra.job.override_dirname}`, such as `"conditioning=pooled,seed=1"`.
    """
    name = overrides.replace("=", "-").replace(",", "+") or "job"
    name = re.sub(r"[^\w.+-]", lambda match: f"%{ord(match[0]):02X}", name, flags=re.ASCII)
    if len(name) <= NAME_LENGTH:
        return name
    return f"{name[: NAME_LENGTH - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


class Sweep(Callback):
    """Prepares a sweep, for any sweeper and launcher."""

    table: Path | None = None  # of the sweep that this process runs
    start: int = 0  # ns, by the file system's clock: jobs may run on other machines

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Name jobs by what differs between them, maximise, and start a new table."""
        overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        shared = ",".join(o.key_or_group for o in overrides if not o.is_sweep_override())
        with open_dict(config):
            # The jobs' configs are composed from these overrides.
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{shared}]"
            )
        if "direction" in config.hydra.sweeper:  # Optuna's default is to minimise
            config.hydra.sweeper.direction = "maximize"
        Sweep.table = Path(config.hydra.sweep.dir) / TABLE_FILE
        Sweep.table.parent.mkdir(parents=True, exist_ok=True)
        Sweep.table.write_text("")
        Sweep.start = Sweep.table.stat().st_mtime_ns


@contextmanager
def jobs_listed() -> Iterator[None]:
    """List the jobs of the sweep that ran inside, if any; exit with code 1 if one failed."""
    Sweep.table = None
    try:
        yield
    except Exception:
        # Optuna raises an error if all jobs have failed, but the table says more.
        if not _list_jobs():
            raise
        sys.exit(1)
    if _list_jobs():
        sys.exit(1)


def _list_jobs() -> bool:
    """Print and write the table of the jobs; return whether any failed."""
    if Sweep.table is None:
        return False
    files = sorted(Sweep.table.parent.glob(f"*/{JOB_FILE}"))
    files = [file for file in files if file.stat().st_mtime_ns >= Sweep.start]
    jobs = {file.parent: json.loads(file.read_text()) for file in files}
    if not jobs:
        return False
    shared = set.intersection(*(set(job["overrides"]) for job in jobs.values()))
    rows = [
        {
            "job": " ".join(o for o in job["overrides"] if o not in shared) or folder.name,
            "status": job["status"],
            "folder": str(folder),
        }
        for folder, job in jobs.items()
    ]
    table = markdown_table(rows)
    Sweep.table.write_text(table)
    print(f"\n{table}")
    return any(job["status"] not in ("finished", "skipped") for job in jobs.values())


def run_job(config: DictConfig, program: list[str]) -> float | None:
    """Run one job of a sweep as its own command, unless it has finished already.

    A job that was started before is resumed from its checkpoint, if it has one.

    Args:
        config: The job's config.
        program: Arguments with which Python runs the entry point.

    Returns:
        The last validation feature cosine; `None` if the job failed or there is none.
    """
    sweep = HydraConfig.get().sweep
    folder = Path(sweep.dir) / sweep.subdir
    file = folder / JOB_FILE
    overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith("output=")]
    job = {"overrides": [o for o in overrides if not o.startswith("logger")], "finished": False}
    before = json.loads(file.read_text()) if file.exists() else None
    if before and not before["finished"] and not (folder / LAST_FILE).is_file():
        before = None  # no progress to lose
    if before and set(before["overrides"]) != set(job["overrides"]):
        others = " ".join(o for o in before["overrides"] if o not in job["overrides"])
        status = (
            "failed: The folder holds a job with other values "
            f"({others or 'fewer of them'}): choose another output."
        )
        file.write_text(json.dumps(before | {"status": status}))
        return None
    if before and before["finished"]:
        job |= {"status": "skipped", "finished": True}
    else:
        file.write_text(json.dumps(job | {"status": "failed: It was killed."}))
        if before:
            arguments = [f"resume={quoted(folder)}"]
        else:
            arguments = [*overrides, f"output={quoted(folder)}", *_wandb_names(config, folder)]
        error = _run(program, arguments)
        job |= {"status": f"failed: {error}" if error else "finished", "finished": not error}
    file.write_text(json.dumps(job))
    points = curves(folder).get(OBJECTIVE)
    return points[-1][1] if job["finished"] and points else None


def _wandb_names(config: DictConfig, folder: Path) -> list[str]:
    """Return overrides that name the W&B run after the job and its group after the sweep."""
    wandb = OmegaConf.select(config, "logger.wandb") or {}
    names = {"group": folder.absolute().parent.name, "name": folder.name}
    return [
        f"logger.wandb.{key}={quoted(name)}"
        for key, name in names.items()
        if key in wandb and wandb[key] is None
    ]


def _run(program: list[str], overrides: list[str]) -> str | None:
    """Run an entry point, showing its output; return its error as a sentence if it fails."""
    job = HydraConfig.get()
    sources = [s for s in job.runtime.config_sources if s.provider in CONFIG_FLAGS]
    flags = [f"{CONFIG_FLAGS[source.provider]}={source.path}" for source in sources]
    flags.append(f"--config-name={job.job.config_name}")
    command = [sys.executable, *program, *flags, *overrides]
    # Under Slurm, Lightning starts the ranks itself only if it believes the job is interactive.
    environment = {**os.environ, "SLURM_JOB_NAME": "interactive"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as child:
        try:
            stderr = _forward_stderr(child)
        except KeyboardInterrupt:  # the job received it too, and saves a checkpoint
            _forward_stderr(child)
            raise
    if child.returncode == 0:
        return None
    # The first error is the cause of the other ranks' errors.
    if error := re.search(ERROR_LINE, stderr.replace("\r", "\n"), re.MULTILINE):
        return error[1].removeprefix("Error: ")
    if child.returncode < 0:
        return f"It was ended by {signal.Signals(-child.returncode).name}."
    return f"It ended with exit code {child.returncode}."


def _forward_stderr(child: subprocess.Popen) -> str:
    """Copy a process's stderr to ours as it comes; return the end of it."""
    stderr = ""
    while chunk := child.stderr.read1():
        text = chunk.decode(errors="replace")
        sys.stderr.write(text)
        sys.stderr.flush()
        stderr = (stderr + text)[-100_000:]
    return stderr
