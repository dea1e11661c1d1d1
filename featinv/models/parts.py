"""Checks that the parts of a FeatInv fit each other."""

from diffusers import UNet2DConditionModel
from torch import nn

from featinv.diffusion import Diffusion
from featinv.sampling import SamplerConfig
from featinv.utils.errors import InputError


def check_parts(
    unet: UNet2DConditionModel,
    latent_shape: tuple[int, int, int],
    diffusion: Diffusion,
    sampler: SamplerConfig,
    prompts: nn.Module | None,
) -> None:
    """Raise an `InputError` for incompatible parts."""
    sampler.make_scheduler(diffusion)
    if unet.config.in_channels != latent_shape[0]:
        raise InputError(
            f"The UNet takes latents of {unet.config.in_channels} channels, but the codec's have "
            f"{latent_shape[0]}: expected the codec that the UNet was trained with."
        )
    trained_for = getattr(unet, "diffusion_config", diffusion.scheduler_config)
    for key, value in diffusion.scheduler_config.items():
        if trained_for[key] != value:
            raise InputError(
                f"model.diffusion.{key} is {value}, but the prior was trained with "
                f"{trained_for[key]}: expected the same."
            )
    if prompts is not None:
        found = prompts.embeddings.shape[2]
        expected = unet.config.cross_attention_dim if reads_prompts(unet) else 0
        if found != expected:
            raise InputError(
                f"The prompts' embeddings have {found} channels, but the UNet reads {expected}: "
                "expected the text encoder that the UNet was trained with, or no prompts for a "
                "UNet without cross-attention."
            )
    check_guidance(sampler, unet)


def check_guidance(sampler: SamplerConfig, unet: UNet2DConditionModel) -> None:
    """Raise an `InputError` if a sampler guides by a text that the UNet does not read."""
    if sampler.guidance == "text" and not reads_prompts(unet):
        raise InputError(
            "sampler.guidance is text, but the UNet reads no prompt to guide by: expected features."
        )


def reads_prompts(unet: UNet2DConditionModel) -> bool:
    """Return whether a UNet has cross-attention, which reads the context of a prompt."""
    blocks = [*unet.config.down_block_types, unet.config.mid_block_type or ""]
    return any("CrossAttn" in block for block in blocks)
