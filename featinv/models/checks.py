"""What the values and the parts of a model must agree on, told in one sentence each."""

from diffusers import UNet2DConditionModel
from diffusers.optimization import SchedulerType
from torch import nn

from featinv.sampling import SamplerConfig
from featinv.utils.errors import InputError, unknown

CONDITIONINGS = ("spatial", "pooled", "none")


def check_values(conditioning: str, lr_schedule: str, warmup_steps: int, seed: int) -> None:
    """Raise an `InputError` for a value of an `Inverter` out of its range."""
    if conditioning not in CONDITIONINGS:
        raise unknown("conditioning", conditioning, CONDITIONINGS)
    # A piecewise constant schedule needs rules that `get_scheduler` is not given here.
    schedules = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]
    if lr_schedule not in schedules:
        raise unknown("model.lr_schedule", lr_schedule, schedules)
    if warmup_steps < 0:
        raise InputError(f"model.warmup_steps is {warmup_steps}, expected 0 or more.")
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more.")


def reads_prompts(unet: UNet2DConditionModel) -> bool:
    """Return whether a UNet has cross-attention, which reads the context of a prompt."""
    blocks = [*unet.config.down_block_types, unet.config.mid_block_type or ""]
    return any("CrossAttn" in block for block in blocks)


def check_prompts(unet: UNet2DConditionModel, prompts: nn.Module | None) -> None:
    """Raise an `InputError` if the prompts' embeddings are not what the UNet reads."""
    if prompts is None:
        return
    found = prompts.embeddings.shape[2]
    expected = unet.config.cross_attention_dim if reads_prompts(unet) else 0
    if found != expected:
        raise InputError(
            f"The prompts' embeddings have {found} channels, but the UNet reads {expected}: "
            "expected the text encoder that the UNet was trained with, or no prompts for a UNet "
            "without cross-attention."
        )


def check_guidance(unet: UNet2DConditionModel, sampler: SamplerConfig) -> None:
    """Raise an `InputError` if a sampler guides by a text that the UNet does not read."""
    if sampler.guidance == "text" and not reads_prompts(unet):
        raise InputError(
            "sampler.guidance is text, but the UNet reads no prompt to guide by: expected features."
        )
