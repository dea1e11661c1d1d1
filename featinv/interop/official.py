"""Import of checkpoints of the original FeatInv code.

The original (Neukirch et al. 2025, built on the code of ControlNet, Zhang et al. 2023) keeps UNet,
ControlNet and VAE of Stable Diffusion 1 in one state dict, under the names of latent diffusion
(Rombach et al. 2022). diffusers converts the names; a tensor that is missing, left over or of
another shape is an error.
"""

import re
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from featinv.backbones import Backbone
from featinv.codecs import StableDiffusionVAE
from featinv.diffusion import Diffusion
from featinv.extractors import FeatureExtractor
from featinv.interop.stable_diffusion import Prompts
from featinv.models.featinv import FeatInv
from featinv.sampling import SamplerConfig
from featinv.utils.errors import InputError
from featinv.utils.files import describe_folder
from featinv.utils.tensor_files import read_state_dict

IMAGE_SIZE = 256
BACKBONE, BACKBONE_IMAGE_SIZE, FEATURE_SIZE = "convnext_base.fb_in22k_ft_in1k", 288, (9, 9)

# Prefixes of the state dict's parts. The feature encoder is part of the ControlNet.
UNET, CONTROLNET, VAE = "model.diffusion_model.", "control_model.", "first_stage_model."
ENCODER = f"{CONTROLNET}input_hint_block.block."
ENCODER_NAMES = {"1": "conv_in", "3": "conv_mid", "5": "conv_out"}
# Not needed: the text encoder, and tables derived from the noise schedule.
IGNORED = re.compile(
    r"cond_stage_model\..*|betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|logvar"
    r"|log_one_minus_alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod|posterior_mean_coef[12]"
    r"|posterior_variance|posterior_log_variance_clipped|lvlb_weights"
)


class AbsentBackbone(FeatureExtractor):
    """Placeholder for the original's backbone, whose weights are not in its checkpoints.

    It knows the shape of the features: enough to run the model on features computed elsewhere.

    Args:
        feature_channels: Channels C of the features.
    """

    name, image_size, classifies = BACKBONE, BACKBONE_IMAGE_SIZE, True

    def __init__(self, feature_channels: int) -> None:
        super().__init__()
        self.feature_shapes = {self.layer: (feature_channels, *FEATURE_SIZE)}

    def features(self, images: Tensor, layer: str | None = None) -> Tensor:
        """Raise an `InputError` that says how to add a backbone."""
        raise InputError(
            "The model was imported without a backbone, so it cannot compute features: expected "
            f"import_original(..., backbone=Backbone('{BACKBONE}', "
            f"image_size={BACKBONE_IMAGE_SIZE})), or the backbone that it was trained with."
        )

    logits = features


def import_original(
    path: str | Path,
    num_attention_heads: int,
    backbone: Backbone | None = None,
    prompts: Prompts | None = None,
) -> FeatInv:
    """Build a model from a checkpoint of the original FeatInv code.

    Args:
        path: A `.safetensors` file, or one of `torch.save`; the state dict itself or under
            `"state_dict"`.
        num_attention_heads: Heads of each attention layer, 8 in Stable Diffusion 1; the shapes of
            the tensors do not determine it.
        backbone: The classifier that the checkpoint was trained with; `None` leaves it out
            (`AbsentBackbone`): nothing is downloaded, and features must be computed elsewhere.
        prompts: The encoded prompt, from `stable_diffusion.load_prompts`; `None` leaves it out:
            then pass a context to `denoise`; `invert` cannot be called.

    Returns:
        The model in eval mode, float32, on the CPU: frozen UNet and VAE, the original's schedule
        and sampling (50 DDIM steps, guidance 1.75 away from the prompt), features (B, C, h, w) to
        images of 256 px.

    Raises:
        InputError: A missing or corrupt file, or a file, backbone or prompts that do not fit.
    """
    state = read_state(path)
    try:
        return convert(state, num_attention_heads, backbone, prompts).eval()
    except KeyError as error:
        raise InputError(
            f"The checkpoint '{path}' is not one of the original FeatInv code: it has no tensor "
            f"{error}; expected keys under {UNET}*, {CONTROLNET}* and {VAE}* (FeatInv.load loads "
            "runs of this project)."
        ) from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, without running code that a pickle may hold."""
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"There is no checkpoint '{path}': expected a .ckpt or .safetensors file of the "
            f"original FeatInv code; {describe_folder(path)}."
        )
    try:
        state = read_state_dict(path)
    except Exception as error:  # torch.load raises many types for a damaged file
        raise InputError(
            f"The checkpoint '{path}' cannot be read ({type(error).__name__}): expected an intact "
            ".safetensors file, or a .ckpt or .pth file of nothing but tensors and plain values."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def convert(
    state: dict[str, Tensor],
    num_attention_heads: int,
    backbone: Backbone | None = None,
    prompts: Prompts | None = None,
) -> FeatInv:
    """Build a model from the original's state dict; see `import_original`.

    Raises:
        KeyError: A tensor that determines a size is missing.
    """
    diffusion = Diffusion()
    if "alphas_cumprod" in state:
        _check_schedule(state["alphas_cumprod"], diffusion)
    state = {key: value for key, value in state.items() if not IGNORED.fullmatch(key)}
    unet = UNet2DConditionModel(**unet_config(state, num_attention_heads))
    vae = AutoencoderKL(**vae_config(state))
    hidden_channels, feature_channels = state[f"{ENCODER}1.weight"].shape[:2]
    if backbone is not None and backbone.feature_shape[0] != feature_channels:
        raise InputError(
            f"The backbone '{backbone.name}' gives features of {backbone.feature_shape[0]} "
            f"channels, expected the checkpoint's {feature_channels}."
        )
    model = FeatInv(
        backbone=backbone or AbsentBackbone(feature_channels),
        codec=StableDiffusionVAE(vae),
        unet=unet,
        diffusion=diffusion,
        sampler=SamplerConfig("ddim", num_steps=50, guidance_scale=1.75, guidance="text"),
        image_size=IMAGE_SIZE,
        conditioning="spatial",
        train_unet=False,
        hidden_channels=hidden_channels,
        cond_drop_prob=0.15,
        optimizer=partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.01),
        prompts=prompts,
    )
    without_encoder = {k: v for k, v in state.items() if not k.startswith(ENCODER)}
    encoder = {}
    for key in state.keys() - without_encoder.keys():
        number, kind = key.removeprefix(ENCODER).split(".")
        encoder[f"{ENCODER_NAMES.get(number, number)}.{kind}"] = state[key]
    parts = [
        (unet, convert_ldm_unet_checkpoint(state, unet.config)),
        (model.controlnet, convert_controlnet_checkpoint(without_encoder, unet.config)),
        (model.feature_encoder[0], encoder),
        (vae, convert_ldm_vae_checkpoint(state, vae.config)),
    ]
    for module, tensors in parts:
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            raise InputError(
                "The checkpoint is not of the original FeatInv's architecture: "
                f"{' '.join(str(error).split())}"
            ) from error
    used = {tensor.data_ptr() for _, tensors in parts for tensor in tensors.values()}
    if unused := [key for key, tensor in state.items() if tensor.data_ptr() not in used]:
        raise InputError(
            f"The checkpoint holds {len(unused)} tensors that have no place in the model, the "
            f"first '{min(unused)}': expected the UNet, ControlNet and VAE of the original FeatInv."
        )
    return model


def unet_config(state: dict[str, Tensor], num_attention_heads: int) -> dict:
    """Return the arguments of `UNet2DConditionModel`: Stable Diffusion 1's, but for the widths."""
    # The first residual block of each level.
    channels = [
        state[f"{UNET}input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in (1, 4, 7, 10)
    ]
    if num_attention_heads < 1 or any(c % num_attention_heads for c in channels):
        raise InputError(
            f"num_attention_heads is {num_attention_heads}, expected a divisor of the UNet's "
            f"channels {', '.join(map(str, channels))}; Stable Diffusion 1 has 8."
        )
    to_k = state[f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    return {
        "sample_size": IMAGE_SIZE // 8,
        "block_out_channels": channels,
        "cross_attention_dim": to_k.shape[1],
        "attention_head_dim": num_attention_heads,  # diffusers' name for the number of heads
    }


def vae_config(state: dict[str, Tensor]) -> dict:
    """Return the arguments of `AutoencoderKL`: Stable Diffusion 1's, but for the widths."""
    blocks = (f"{VAE}encoder.down.{level}.block.0.conv1.weight" for level in range(4))
    return {
        "sample_size": IMAGE_SIZE,
        "block_out_channels": [state[block].shape[0] for block in blocks],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


def _check_schedule(alphas_cumprod: Tensor, diffusion: Diffusion) -> None:
    expected = diffusion.alphas_cumprod
    if alphas_cumprod.shape != expected.shape or not torch.allclose(
        alphas_cumprod.float(), expected, rtol=0, atol=1e-4
    ):
        raise InputError(
            f"The checkpoint's noise schedule has {len(alphas_cumprod)} steps and ends at "
            f"alphas_cumprod {alphas_cumprod[-1]:.4g}, expected Stable Diffusion's with "
            f"{len(expected)} steps, which ends at {expected[-1]:.4g}."
        )
