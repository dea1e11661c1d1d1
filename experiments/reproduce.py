"""Train what is missing, and fill every table and figure of one scale into one folder.

python experiments/reproduce.py scale=small root=PATH
python experiments/reproduce.py scale=paper root=PATH     # prints commands and GPU hours

The steps stand in configs/reproduce/scale/. One that has made its file is not done again; one that
fails does not stop those that do not need it, and the same command tries it again.
"""

import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm

from featinv.cli.app import command, run_entry_point
from featinv.evaluation.tables import markdown_table
from featinv.utils.errors import InputError, at_least, unknown
from featinv.utils.files import atomic_write

log = logging.getLogger("reproduce")

PRECISION = "bf16-mixed"  # of the trainings and drawings whose hours are estimated


@dataclass(frozen=True)
class Step:
    """One command of a plan.

    Args:
        name: Of the step, and of its folder among the results.
        says: What it is, in a few words.
        command: What is run, from the repository's root.
        makes: The file that shows that it is done.
        needs: Names of the steps that come first.
        results: Names of the files, beside `makes`, that belong to the results.
        train_images: How many images its training sees.
        drawn_images: How many images it draws.
    """

    name: str
    says: str
    command: str
    makes: str
    needs: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    train_images: int = 0
    drawn_images: int = 0


def read_plan(config: DictConfig) -> dict[str, Step]:
    """Return name -> step of the scale's plan, in its order, with the config's values filled in.

    Raises:
        InputError: Unknown step, or no data.
    """
    if config.root is None:
        raise InputError("The data are missing: expected root=PATH, the folder of their shards.")
    for name in ("steps", "epochs", "images", "samples", "guided_images"):
        at_least(name, config[name], 1)
    steps: dict[str, Step] = {}
    for name, values in OmegaConf.to_container(config, resolve=True)["plan"].items():
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        steps[name] = Step(name, **values | {"command": " ".join(values["command"].split())})
        for needed in steps[name].needs:
            if needed not in steps:
                raise unknown(f"step that '{name}' needs", needed, steps)
    for name in config.only or ():
        if name not in steps:
            raise unknown("step", name, steps)
    return steps


def carry_out(step: Step, ended: dict[str, str], folder: Path) -> str:
    """Run a step if it is not done; return how it ended."""
    if Path(step.makes).is_file():
        return "was there"
    if lacking := [name for name in step.needs if ended.get(name, "").startswith("failed")]:
        return f"failed: it needs {', '.join(lacking)}"
    log_file = folder / f"{step.name}.log"
    log.info("%s: %s (log in %s)", step.name, step.command, log_file)
    start = time.perf_counter()
    with log_file.open("w") as output:
        words = shlex.split(step.command)
        words[0] = sys.executable if words[0] == "python" else words[0]
        code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT).returncode
    if code == 0 and Path(step.makes).is_file():
        return f"made in {(time.perf_counter() - start) / 60:.1f} min"
    last = log_file.read_text(errors="replace").strip().rpartition("\n")[2]
    return f"failed with exit code {code}: {last[-200:]}"


def collect(steps: dict[str, Step], results: Path) -> None:
    """Copy the results of the steps that are done, and write the README that explains them."""
    sections = [
        "# Results\n\nWhat each number is, and the command that makes it again; the paths in it "
        "are those of whoever made it.\n"
    ]
    for step in steps.values():
        made = Path(step.makes)
        found = [made.parent / name for name in step.results if (made.parent / name).is_file()]
        if not found:
            continue
        folder = results / step.name
        folder.mkdir(parents=True, exist_ok=True)
        for file in found:
            shutil.copy(file, folder / file.name)
        date = datetime.fromtimestamp(made.stat().st_mtime, UTC).date()
        parts = [f"## {step.name}: {step.says}\n", f"{date}\n"]
        parts += [f"![]({step.name}/{f.name})\n" for f in found if f.suffix == ".png"]
        parts += [f.read_text() for f in found if f.suffix == ".md"]  # they name their command
        sections.append("\n".join(parts))
    with atomic_write(results / "README.md") as file:
        file.write("\n".join(sections).encode())


def seconds_per_image(benchmark: dict, gpu_tflops: float | None) -> tuple[float, float]:
    """Return the seconds that an image costs in training, and drawn with 20 denoising steps.

    Args:
        benchmark: What experiments/benchmark.py wrote.
        gpu_tflops: 10^12 operations a second that the GPU is said to sustain: the benchmark's
            seconds are scaled from its own. `None`: they are taken as they are.
    """

    def measured(kind: str, **values: object) -> dict:
        wanted = {"way": "featinv", "precision": PRECISION, **values}
        rows = [r for r in benchmark[kind] if all(r[k] == v for k, v in wanted.items())]
        if not rows:
            raise InputError(f"The benchmark has no {kind} of {wanted}: expected one with it.")
        return rows[-1]  # the largest batch

    training = measured("measure_training")
    drawing = measured("measure_sampling", scheduler="dpm_solver", steps=20)
    factor = 1 if gpu_tflops is None else training["tflops"] / gpu_tflops
    per_image = training["seconds"]["step"] / training["batch"]
    return factor * per_image, factor * drawing["seconds_per_image"]


def plan_table(steps: dict[str, Step], benchmark: dict, gpu_tflops: float | None) -> str:
    """Return the steps with their estimated hours, as Markdown."""
    training, drawing = seconds_per_image(benchmark, gpu_tflops)
    rows, total = [], 0.0
    for step in steps.values():
        hours = (step.train_images * training + step.drawn_images * drawing) / 3600
        total += hours
        rows.append({"step": step.name, "GPU hours": f"{hours:.1f}", "command": step.command})
    rows.append({"step": "all", "GPU hours": f"{total:.0f}", "command": ""})
    return markdown_table(rows)


def main(config: DictConfig) -> None:
    """Print the plan, or carry it out."""
    plan = read_plan(config)
    steps = {name: plan[name] for name in plan if config.only is None or name in config.only}
    if config.dry_run:
        benchmark = json.loads(Path(config.benchmark).read_text())
        print(plan_table(steps, benchmark, config.gpu_tflops))
        how = (
            "as measured"
            if config.gpu_tflops is None
            else f"scaled to a GPU that sustains {config.gpu_tflops:g} TFLOP/s, an assumption"
        )
        print(f"Hours from {config.benchmark}, {PRECISION}, {how}.")
        return
    output, results = Path(config.output), Path(config.results)
    ended: dict[str, str] = {}
    try:
        for name, step in tqdm(steps.items(), unit="step", desc="reproduce"):
            ended[name] = carry_out(step, ended, output)
            log.info("%s: %s", name, ended[name])
    finally:  # what is there is put together, whatever ended the rest
        collect(plan, results)
        rows = [{"step": name, "how it ended": how} for name, how in ended.items()]
        if rows:
            text = f"{markdown_table(rows)}\nMade by `{command()}`.\n"
            (output / "steps.md").write_text(text)
            print(f"\n{text}")
    if failed := [name for name, how in ended.items() if how.startswith("failed")]:
        raise InputError(
            f"{len(failed)} of {len(steps)} steps failed: {', '.join(failed)}; their logs are in "
            f"'{output}'. Expected: mend what they say, and the same command again."
        )
    log.info("Everything is in %s", results)


if __name__ == "__main__":
    run_entry_point(main, "reproduce/reproduce")
