"""The benchmark's measurements: training steps, inversions, checkpoints and data loaders.

A measurement takes a plain dict as config, so that it can run in a process of its own.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from diffusers.models.attention_processor import AttnProcessor
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from featinv.checkpoints import build_model, save_model
from featinv.utils.devices import pick_device, timed
from featinv.utils.errors import InputError
from featinv.utils.seeding import Draw, make_generator

GB = 1e9


class Clock:
    """Adds up seconds and CPU-seconds by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to a name."""
        with timed(self.device) as spent:
            yield
        self.seconds[name] += spent.seconds
        self.cpu_seconds[name] += spent.cpu_seconds

    def reset(self) -> None:
        """Forget all times."""
        self.seconds.clear()
        self.cpu_seconds.clear()

    def watch(self, owner: object, method: str, name: str) -> None:
        """Measure every call of a method of an object."""
        function = getattr(owner, method)

        def measured(*args: object, **kwargs: object):
            with self.measure(name):
                return function(*args, **kwargs)

        object.__setattr__(owner, method, measured)


class Workload:
    """A model on its device, with its inputs.

    Args:
        config: The benchmark's.
        precision: `"32-true"` or `"bf16-mixed"`.
        original: Run it the way the original's code does.
    """

    def __init__(self, config: dict, precision: str, original: bool = False) -> None:
        self.config = config
        self.device = pick_device(config["device"])
        self.autocast = (
            torch.autocast(self.device.type, torch.bfloat16)
            if precision == "bf16-mixed"
            else nullcontext()
        )
        self.model = build_model(config["model"]).to(self.device)
        self.text_encoder = None
        if original:
            self._as_the_original()
        elif precision == "bf16-mixed" and not self.model.train_unet:
            self.model.unet.to(torch.bfloat16)

    def compile(self) -> None:
        """Compile the networks if the config says so."""
        if self.config["compile"]:
            self.model.unet.compile()
            self.model.controlnet.compile()

    def _as_the_original(self) -> None:
        model = self.model
        for module in (model.unet, model.controlnet):
            module.set_attn_processor(AttnProcessor())
        for module in (model.unet.up_blocks, model.unet.conv_norm_out, model.unet.conv_out):
            module.requires_grad_(True)
        if model.prompts is not None:  # the text encoder of Stable Diffusion 1
            dims = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
            self.text_encoder = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12, **dims))
            self.text_encoder.to(self.device).eval().requires_grad_(False)
        look = model.backbone.all_features

        def one_by_one(images: torch.Tensor) -> dict[str, torch.Tensor]:
            seen = [look(image[None]) for image in images]
            return {layer: torch.cat([maps[layer] for maps in seen]) for layer in seen[0]}

        model.backbone.all_features = one_by_one

    def images(self, number: int) -> torch.Tensor:
        """Return noise images, shape (number, 3, H, W), in [-1, 1]."""
        size = self.config["data"]["image_size"]
        return torch.rand(number, 3, size, size, device=self.device) * 2 - 1

    def encode_prompts(self, number: int) -> None:
        """Encode prompts, which the original does in every step; do nothing in our way."""
        if self.text_encoder is not None:
            with torch.no_grad():
                self.text_encoder(torch.zeros(number, 77, dtype=torch.long, device=self.device))

    def peak_memory(self) -> float:
        """Return the peak memory of the process so far, in GB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GB
        unit = 1 if sys.platform == "darwin" else 1024  # bytes; on Linux kilobytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def measure_training(config: dict, precision: str, original: bool, batch_size: int) -> dict:
    """Return the mean time of a training step by phase, and the peak memory."""
    work = Workload(config, precision, original)
    model = work.model
    make_optimizer = torch.optim.AdamW if original else model.make_optimizer
    optimizer = make_optimizer(model.trained().parameters())
    timesteps = torch.full((batch_size,), 500, device=work.device)
    keep = torch.ones(batch_size, dtype=torch.bool, device=work.device)
    images = work.images(batch_size)
    clock = Clock(work.device)

    def step() -> None:
        generators = [make_generator(0, Draw.TRAINING, i) for i in range(batch_size)]
        with clock.measure("step"):
            with work.autocast:
                work.encode_prompts(batch_size)
                loss = model.losses(images, timesteps, keep, generators).mean()
            with clock.measure("backward"):
                loss.backward()
            with clock.measure("optimiser"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=not original)

    with FlopCounterMode(display=False) as flops:  # before compilation, which hides operations
        step()
    work.compile()
    step()
    clock.watch(model.backbone, "all_features", "features")
    clock.watch(model.codec, "encode", "encode")
    clock.watch(model.feature_encoder, "of_each", "forward")
    clock.watch(model, "predict", "forward")
    clock.reset()
    for _ in range(config["repeats"]):
        step()
    seconds = {name: total / config["repeats"] for name, total in clock.seconds.items()}
    return {
        "seconds": seconds,
        "cpu_seconds": clock.cpu_seconds["step"] / config["repeats"],
        "peak_gb": work.peak_memory(),
        "tflops": flops.get_total_flops() / seconds["step"] / 1e12,
    }


def unbatched_guidance(conditional, unconditional, both, scale: float):
    """Classifier-free guidance in two passes, as in the original's sampler."""

    def denoise(z_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        with_condition, without = conditional(z_t, timesteps), unconditional(z_t, timesteps)
        return without + scale * (with_condition - without)

    return denoise


@torch.no_grad()
def measure_sampling(
    config: dict, precision: str, original: bool, scheduler: str, num_steps: int
) -> dict:
    """Return the time per image of an inversion, from features to images."""
    work = Workload(config, precision, original)
    work.compile()
    model = work.model.eval()
    number = config["sampling_batch_size"]
    features = model.backbone.features(work.images(number))
    clock = Clock(work.device)
    clock.watch(model.codec, "decode", "decode")
    guidance = unbatched_guidance if original else None
    patch = mock.patch("featinv.models.featinv.classifier_free_guidance", guidance)
    with patch if original else nullcontext():
        options = {"scheduler": scheduler, "batch_size": number, "precision": precision}
        model.invert(features, num_steps=1, **options)
        clock.reset()
        with clock.measure("all"):
            with work.autocast:
                work.encode_prompts(2 * number)
            model.invert(features, num_steps=num_steps, **options)
    return {
        "seconds_per_image": clock.seconds["all"] / number,
        "decode_seconds_per_image": clock.seconds["decode"] / number,
        "cpu_seconds_per_image": clock.cpu_seconds["all"] / number,
        "peak_gb": work.peak_memory(),
    }


def measure_checkpoint(config: dict) -> dict:
    """Return the size of a model's checkpoint in bytes, and parameter counts."""
    model = Workload(config, "32-true").model
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder, "model.safetensors"))
        size = Path(folder, "model.safetensors").stat().st_size

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    parts = ("unet", "controlnet", "feature_encoder", "codec")
    return {"bytes": size, "parameters": {name: count(getattr(model, name)) for name in parts}}


def measure_data(config: dict, workers: int) -> dict:
    """Return the training samples per second of a data loader."""
    data = instantiate({**config["data"], "num_workers": workers, "batch_size": 32})
    batches = iter(data.train_dataloader())
    next(batches)  # the workers have started
    start = time.perf_counter()
    number = sum(len(batch["index"]) for batch in islice(batches, 20))
    return {"samples_per_second": number / (time.perf_counter() - start)}


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def in_process(measure: Callable, *args: object) -> dict:
    """Run a measurement in a fresh process.

    Raises:
        InputError: Bad input, or the process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _prepare, (torch.get_num_threads(),)) as pool:
        try:
            return pool.submit(measure, *args).result()
        except BrokenProcessPool as error:
            raise InputError(
                f"{measure.__name__}{args[1:]} ended without a result, perhaps for lack of memory; "
                "expected a smaller batch."
            ) from error
