"""Make every table and figure of one scale, and collect them in one folder.

python experiments/reproduce.py scale=small root=PATH
python experiments/reproduce.py scale=paper recipe=fast root=PATH only=[train_resnet50_*]

The steps are in experiments/plans/. Finished ones are skipped; a failed one stops only those that
depend on it, and the same command tries it again. Several machines with a common file system can
share a plan by `only`. Without a GPU, scale=paper prints commands and GPU hours.
"""

import fnmatch
import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm.auto import tqdm

from featinv.cli.app import command, run_entry_point
from featinv.evaluation.tables import markdown_table
from featinv.utils.errors import InputError, unknown
from featinv.utils.files import write_text
from plans import PLANS
from plans.paper import RECIPES
from plans.steps import Plan, Step
from settings import as_list

log = logging.getLogger("reproduce")

ROOT = Path(__file__).parents[1]


def choose(plan: Plan, only: list[str] | None) -> dict[str, Step]:
    """Return the steps whose names match one of the patterns; all of them without patterns."""
    for pattern in only or ():
        if not fnmatch.filter(plan, pattern):
            raise unknown("step", pattern, plan)
    matching = {name for pattern in only or ("*",) for name in fnmatch.filter(plan, pattern)}
    return {name: step for name, step in plan.items() if name in matching}


def run_step(step: Step, folder: Path) -> str:
    """Run a step unless it is done; return its status."""
    if step.product.is_file():
        return "already done"
    if missing := [needed.name for needed in step.needs if not needed.product.is_file()]:
        return f"failed: it needs {', '.join(missing)}"
    log_file = folder / f"{step.name}.log"
    log.info("%s: %s (log in %s)", step.name, command_line(step), log_file)
    start = time.perf_counter()
    with log_file.open("w") as output:
        words = [sys.executable, str(ROOT / step.file), *step.arguments]
        code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT).returncode
    if code == 0 and step.product.is_file():
        return f"made in {(time.perf_counter() - start) / 60:.1f} min"
    last = log_file.read_text(errors="replace").strip().rpartition("\n")[2]
    return f"failed with exit code {code}: {last[-200:]}"


def command_line(step: Step) -> str:
    """Return a step's command for a shell in the repository's root."""
    return shlex.join(["python", step.file, *step.arguments])


def collect(plan: Plan, results: Path) -> None:
    """Copy the results of the finished steps, and write the README of all that are there.

    A step's `results` are patterns of files in its folder.
    """
    sections = [
        "# Results\n\nEvery number with the command that reproduces it; the paths are those of the "
        "machine that made it.\n"
    ]
    for step in plan.values():
        folder = results / step.name
        if step.product.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            for file in (file for name in step.results for file in step.folder.glob(name)):
                shutil.copy(file, folder / file.name)
        # Keep sections made on other machines.
        if files := sorted(file for name in step.results for file in folder.glob(name)):
            parts = [f"## {step.name}: {step.about}\n" if step.about else f"## {step.name}\n"]
            parts += [f"![]({step.name}/{f.name})\n" for f in files if f.suffix == ".png"]
            parts += [f.read_text() for f in files if f.suffix == ".md"]  # they name their command
            sections.append("\n".join(parts))
    write_text(results / "README.md", "\n".join(sections))


def gpu_hours(config: DictConfig) -> tuple[float, float, str]:
    """Return the hours to train on an image and to draw one, and how they are estimated.

    Those of the benchmark are scaled to a GPU that sustains `gpu_tflops` 10^12 operations per
    second, or taken as measured if that is null.
    """
    num_steps, precision = RECIPES[config.recipe]
    benchmark = json.loads((ROOT / config.benchmark).read_text())

    def measured(kind: str, **values: object) -> dict:
        wanted = {"way": "featinv", "precision": precision, **values}
        rows = [r for r in benchmark[kind] if all(r[k] == v for k, v in wanted.items())]
        if not rows:
            raise InputError(f"The benchmark has no {kind} of {wanted}: expected one with it.")
        return rows[-1]  # the largest batch

    training = measured("measure_training")
    drawing = measured("measure_sampling", scheduler="dpm_solver", steps=20)
    factor, speed = 1 / 3600, "as measured"
    if config.gpu_tflops is not None:
        tflops = config.gpu_tflops[config.recipe]
        factor *= training["tflops"] / tflops
        speed = f"scaled to a GPU that sustains {tflops:g} TFLOP/s, an assumption"
    about = f"Hours from {config.benchmark}, {precision}, {num_steps} denoising steps, {speed}."
    trained = training["seconds"]["step"] / training["batch"]
    return factor * trained, factor * drawing["seconds_per_image"] * num_steps / 20, about


def print_plan(steps: dict[str, Step], config: DictConfig) -> None:
    """Print the commands and, at the paper's scale, their hours."""
    paper = config.scale == "paper"
    training, drawing, about = gpu_hours(config) if paper else (0, 0, "")
    rows, total = [], 0.0
    for step in steps.values():
        hours = step.trained_images * training + step.drawn_images * drawing
        total += hours
        cost = {"GPU hours": f"{hours:.1f}"} if paper else {}
        rows.append({"step": step.name, **cost, "what": step.about, "command": command_line(step)})
    rows += [{"step": "all", "GPU hours": f"{total:.0f}"}] if paper else []
    print(f"{markdown_table(rows)}\n{about}")


def main(config: DictConfig) -> None:
    """Print the plan, or run it."""
    if config.root is None:
        raise InputError("The data are missing: expected root=PATH, the folder of their shards.")
    plan = PLANS[config.scale](config)
    steps = choose(plan, None if config.only is None else as_list(config.only))
    no_gpu = config.scale == "paper" and not torch.cuda.is_available()
    if no_gpu if config.dry_run is None else config.dry_run:
        print_plan(steps, config)
        return
    output, results = Path(config.output), Path(config.results)
    status: dict[str, str] = {}
    try:
        with tqdm(steps.items(), unit="step", desc="reproduce") as bar:
            for name, step in bar:
                status[name] = run_step(step, output)
                log.info("%s: %s", name, status[name])
    finally:  # collect the finished steps, whatever stopped the others
        collect(plan, results)
        if status:
            rows = [{"step": name, "status": text} for name, text in status.items()]
            text = f"{markdown_table(rows)}\nMade by `{command()}`.\n"
            write_text(output / "steps.md", text)
            print(f"\n{text}")
    if failed := [name for name, text in status.items() if text.startswith("failed")]:
        raise InputError(
            f"{len(failed)} of {len(steps)} steps failed: {', '.join(failed)}; expected none: fix "
            f"what their logs in '{output}' report, and run the same command again."
        )
    log.info("Everything is in %s", results)


if __name__ == "__main__":
    run_entry_point(main, "reproduce/reproduce")
