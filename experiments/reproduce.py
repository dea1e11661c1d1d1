"""Train what is missing, and fill every table and figure of one scale into one folder.

python experiments/reproduce.py scale=small root=PATH
python experiments/reproduce.py scale=paper recipe=fast root=PATH only=[train_resnet50_*]

The steps stand in experiments/plans/. One that has made its file is not done again; one that fails
does not stop those that do not need it, and the same command tries it again. Several machines with
one file system share a plan by `only`. Without a GPU, scale=paper prints commands and GPU hours.
"""

import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from fnmatch import fnmatch
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

log = logging.getLogger("reproduce")

ROOT = Path(__file__).parents[1]


def choose(plan: Plan, only: list[str] | None) -> dict[str, Step]:
    """Return the steps whose names match one of the patterns; all of them if there is none.

    Raises:
        InputError: A pattern matches no step.
    """
    if only is None:
        return dict(plan)
    for pattern in only:
        if not any(fnmatch(name, pattern) for name in plan):
            raise unknown("step", pattern, plan)
    return {n: step for n, step in plan.items() if any(fnmatch(n, pattern) for pattern in only)}


def carry_out(step: Step, folder: Path) -> str:
    """Run a step if it is not done; return how it ended."""
    if step.product.is_file():
        return "was there"
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
    """Return the command of a step, for a shell in the repository's root."""
    return shlex.join(["python", step.file, *step.arguments])


def collect(plan: Plan, results: Path) -> None:
    """Copy the results of the steps that are done, and write the README that explains them."""
    sections = [
        "# Results\n\nWhat each number is, and the command that makes it again; the paths in it "
        "are those of whoever made it.\n"
    ]
    for step in plan.values():
        found = [file for name in step.results if (file := step.folder / name).is_file()]
        if not found or not step.product.is_file():
            continue
        folder = results / step.name
        folder.mkdir(parents=True, exist_ok=True)
        for file in found:
            shutil.copy(file, folder / file.name)
        date = datetime.fromtimestamp(step.product.stat().st_mtime, UTC).date()
        parts = [f"## {step.name}: {step.about}\n", f"{date}\n"]
        parts += [f"![]({step.name}/{f.name})\n" for f in found if f.suffix == ".png"]
        parts += [f.read_text() for f in found if f.suffix == ".md"]  # they name their command
        sections.append("\n".join(parts))
    write_text(results / "README.md", "\n".join(sections))


def seconds_per_image(
    benchmark: dict, precision: str, num_steps: int, gpu_tflops: float | None
) -> tuple[float, float]:
    """Return the seconds that an image costs in training, and to draw.

    Args:
        benchmark: What experiments/benchmark.py wrote.
        precision: Of both.
        num_steps: Denoising steps of a draw; those of the benchmark are scaled to it.
        gpu_tflops: 10^12 operations a second that the GPU is said to sustain: the benchmark's
            seconds are scaled from its own. `None`: they are taken as they are.

    Raises:
        InputError: The benchmark lacks a row.
    """

    def measured(kind: str, **values: object) -> dict:
        wanted = {"way": "featinv", "precision": precision, **values}
        rows = [r for r in benchmark[kind] if all(r[k] == v for k, v in wanted.items())]
        if not rows:
            raise InputError(f"The benchmark has no {kind} of {wanted}: expected one with it.")
        return rows[-1]  # the largest batch

    training = measured("measure_training")
    drawing = measured("measure_sampling", scheduler="dpm_solver", steps=20)
    factor = 1 if gpu_tflops is None else training["tflops"] / gpu_tflops
    drawn = drawing["seconds_per_image"] * num_steps / 20
    return factor * training["seconds"]["step"] / training["batch"], factor * drawn


def gpu_hours(config: DictConfig) -> tuple[float, float, str]:
    """Return hours of an image trained on and drawn, and where they are from."""
    num_steps, precision = RECIPES[config.recipe]
    tflops = None if config.gpu_tflops is None else config.gpu_tflops[config.recipe]
    benchmark = json.loads((ROOT / config.benchmark).read_text())
    training, drawing = seconds_per_image(benchmark, precision, num_steps, tflops)
    how = (
        "as measured"
        if tflops is None
        else f"scaled to a GPU that sustains {tflops:g} TFLOP/s, an assumption"
    )
    about = f"Hours from {config.benchmark}, {precision}, {num_steps} denoising steps, {how}."
    return training / 3600, drawing / 3600, about


def print_plan(steps: dict[str, Step], config: DictConfig) -> None:
    """Print the commands and, at the paper's scale, the hours that they take."""
    paper = config.scale == "paper"
    training, drawing, about = gpu_hours(config) if paper else (0, 0, "")
    rows, total = [], 0.0
    for step in steps.values():
        hours = step.trained_images * training + step.drawn_images * drawing
        total += hours
        row = {"step": step.name, "GPU hours": f"{hours:.1f}", "what": step.about}
        rows.append(row | {"command": command_line(step)})
    rows.append({"step": "all", "GPU hours": f"{total:.0f}"})
    hidden = () if paper else ("GPU hours",)
    rows = [{k: v for k, v in row.items() if k not in hidden} for row in rows]
    print(markdown_table(rows if paper else rows[:-1]))
    print(about)


def main(config: DictConfig) -> None:
    """Print the plan, or carry it out."""
    if config.root is None:
        raise InputError("The data are missing: expected root=PATH, the folder of their shards.")
    plan = PLANS[config.scale](config)
    steps = choose(plan, config.only)
    no_gpu = config.scale == "paper" and not torch.cuda.is_available()
    if no_gpu if config.dry_run is None else config.dry_run:
        print_plan(steps, config)
        return
    output, results = Path(config.output), Path(config.results)
    ended: dict[str, str] = {}
    try:
        with tqdm(steps.items(), unit="step", desc="reproduce") as bar:
            for name, step in bar:
                ended[name] = carry_out(step, output)
                log.info("%s: %s", name, ended[name])
    finally:  # what is there is put together, whatever ended the rest
        collect(plan, results)
        if ended:
            rows = [{"step": name, "how it ended": how} for name, how in ended.items()]
            text = f"{markdown_table(rows)}\nMade by `{command()}`.\n"
            write_text(output / "steps.md", text)
            print(f"\n{text}")
    if failed := [name for name, how in ended.items() if how.startswith("failed")]:
        raise InputError(
            f"{len(failed)} of {len(steps)} steps failed: {', '.join(failed)}; their logs are in "
            f"'{output}'. Expected: mend what they say, and the same command again."
        )
    log.info("Everything is in %s", results)


if __name__ == "__main__":
    run_entry_point(main, "reproduce/reproduce")
