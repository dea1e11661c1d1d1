"""Seconds, CPU-seconds and memory of training and sampling, at the small and the paper's scale.

python experiments/benchmark.py
python experiments/benchmark.py scale=paper device=cuda batch_sizes=[8,16,32,64]

Every row is measured in a process of its own, for the sake of its peak memory. Weights are random
at the paper's scale, and the images are noise: neither changes the time.

The rows "original" run the same networks the way the original's code does: in float32, one image at
a time through the backbone, the prompt encoded in every step, with unused gradients for the UNet's
decoder, attention and optimiser without fused kernels, and the two branches of guidance one after
the other. Gradient checkpointing is left out, which favours the original, if anything.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm

import workloads
from featinv.cli.app import command, run_entry_point
from featinv.evaluation.tables import markdown_table
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.files import write_text

log = logging.getLogger("benchmark")

# Keys of the config that the workloads get.
WORKLOAD = ("model", "data", "device", "compile", "repeats", "sampling_batch_size")
PHASES = ("step", "features", "encode", "forward", "backward", "optimiser")


def plan(config: DictConfig) -> list[tuple[Callable, tuple, dict]]:
    """Return the measurements: (function, arguments, cells that identify the row)."""
    ways = [("32-true", True)] if config.original_steps else []
    ways += [(precision, False) for precision in config.precisions]
    rows = []
    for precision, original in ways:
        cells = {"way": "original" if original else "featinv", "precision": precision}
        for batch_size in config.batch_sizes:
            args = (precision, original, batch_size)
            rows.append((workloads.measure_training, args, {**cells, "batch": batch_size}))
        steps = {"ddim": [config.original_steps]} if original else config.sampling
        for scheduler, number in ((name, n) for name, numbers in steps.items() for n in numbers):
            args = (precision, original, scheduler, number)
            steps_cells = {**cells, "scheduler": scheduler, "steps": number}
            rows.append((workloads.measure_sampling, args, steps_cells))
    return [*rows, (workloads.measure_checkpoint, (), {})]


def training_rows(results: list[dict], peak_tflops: float | None) -> list[dict[str, str]]:
    """Return the table of training steps, as text."""
    rows = []
    for row in results:
        seconds = row["seconds"]
        cells = {
            "training step": row["way"],
            "precision": row["precision"],
            "batch": str(row["batch"]),
            **{f"{name} s": f"{seconds[name]:.3f}" for name in PHASES},
            "CPU-s": f"{row['cpu_seconds']:.2f}",
            "of original": _share(row, results, "cpu_seconds", ("batch",)),
            "images/s": f"{row['batch'] / seconds['step']:.2f}",
            "peak GB": f"{row['peak_gb']:.2f}",
            "TFLOP/s": f"{row['tflops']:.3g}",
        }
        if peak_tflops:
            cells["of peak"] = f"{row['tflops'] / peak_tflops:.1%}"
        rows.append(cells)
    return rows


def sampling_rows(results: list[dict]) -> list[dict[str, str]]:
    """Return the table of whole inversions, as text."""
    return [
        {
            "inversion": row["way"],
            "precision": row["precision"],
            "scheduler": row["scheduler"],
            "steps": str(row["steps"]),
            "s per image": f"{row['seconds_per_image']:.3f}",
            "of which decoding": f"{row['decode_seconds_per_image']:.3f}",
            "CPU-s per image": f"{row['cpu_seconds_per_image']:.2f}",
            "of original": _share(row, results, "seconds_per_image"),
            "peak GB": f"{row['peak_gb']:.2f}",
        }
        for row in results
    ]


def _share(row: dict, rows: list[dict], value: str, same: tuple[str, ...] = ()) -> str:
    """Return a value as a share of the original's."""
    for other in rows:
        if other["way"] == "original" and all(other[key] == row[key] for key in same):
            return f"{row[value] / other[value]:.2f}"
    return ""


def report(config: DictConfig, results: Mapping[str, list[dict]]) -> str:
    """Return the page that is printed and saved."""
    about = (
        f"Scale {config.scale}, device {pick_device(config.device)}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}; mean of {config.repeats} training steps after two; "
        f"inversions of {config.sampling_batch_size} at once with guidance, measured once; data "
        f"{config.data._target_.split('.')[-1]} at {config.data.image_size} px."
    )
    tables = [
        training_rows(results["measure_training"], config.peak_tflops),
        sampling_rows(results["measure_sampling"]),
        [
            {"data workers": str(row["workers"]), "samples/s": f"{row['samples_per_second']:.0f}"}
            for row in results["measure_data"]
        ],
    ]
    parts = [markdown_table(rows) for rows in tables if rows]
    for row in results["measure_checkpoint"]:
        counts = ", ".join(f"{name} {n:,}" for name, n in row["parameters"].items())
        parts.append(f"Checkpoint: {row['bytes']:,} bytes. Parameters: {counts}.\n")
    return "\n".join([*parts, about + "\n", f"Made by `{command()}`.\n"])


def main(config: DictConfig) -> None:
    """Measure everything, save after each row, print the page."""
    for name in ("repeats", "sampling_batch_size"):
        at_least(name, config[name], 1)
    pick_device(config.device)  # raises once, instead of in every process
    folder = Path(config.output)
    values = OmegaConf.to_container(config, resolve=True)
    workload = {key: values[key] for key in WORKLOAD}
    results: dict[str, list[dict]] = defaultdict(list)
    for measure, args, cells in tqdm(plan(config), unit="row", desc="benchmark"):
        try:
            row = workloads.in_process(measure, workload, *args)
            results[measure.__name__].append(cells | row)
        except InputError as error:  # lack of memory in one row does not end the others
            log.warning("Left out: %s", error)
        write_text(folder / "benchmark.json", json.dumps(results, indent=2) + "\n")
    for workers in config.workers:
        row = {"workers": workers} | workloads.measure_data(workload, workers)
        results["measure_data"].append(row)
    write_text(folder / "benchmark.json", json.dumps(results, indent=2) + "\n")
    page = report(config, results)
    write_text(folder / "benchmark.md", page)
    print(f"\n{page}")
    log.info("The numbers are in %s", folder)


if __name__ == "__main__":
    run_entry_point(main, "benchmark")
