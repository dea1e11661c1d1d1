"""Import of checkpoints of the original FeatInv code.

The original (Neukirch et al. 2025, built on the code of ControlNet, Zhang et al. 2023) keeps UNet,
ControlNet and VAE in one state dict under the names of latent diffusion (Rombach et al. 2022).
Here they become the classes of diffusers: the sizes are read off the tensors' shapes, each tensor
of ours is looked up under its original name, and what is missing or left over is an error.
"""

import re
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from featinv.backbones import Backbone
from featinv.codecs import StableDiffusionVAE
from featinv.diffusion import Diffusion
from featinv.interop.stable_diffusion import Prompts
from featinv.models.featinv import FeatInv
from featinv.sampling import SamplerConfig
from featinv.utils.errors import InputError
from featinv.utils.files import describe_folder

IMAGE_SIZE = 256
BACKBONE, BACKBONE_IMAGE_SIZE, FEATURE_SIZE = "convnext_base.fb_in22k_ft_in1k", 288, (9, 9)

# The parts of the state dict, by the prefix of their keys.
UNET, CONTROLNET, VAE = "model.diffusion_model.", "control_model.", "first_stage_model."
# What may stand beside them and is not needed: the text encoder (a prompt is given as `context`)
# and tables computed from the noise schedule, which `_check_schedule` compares by one of them.
IGNORED = re.compile(
    r"cond_stage_model\..*|betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|logvar"
    r"|log_one_minus_alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod|posterior_mean_coef[12]"
    r"|posterior_variance|posterior_log_variance_clipped|lvlb_weights"
)


class AbsentBackbone(nn.Module):
    """Stands in for the original's backbone, whose weights are not in its checkpoints.

    It knows the shape of the features, which is all that building a model and running it on given
    features need, and it spares a download; it makes no features itself.

    Args:
        feature_channels: Channels C of the features.
    """

    name, layer, image_size = BACKBONE, "last", BACKBONE_IMAGE_SIZE
    layers = layer_names = ("last",)
    classifies = True

    def __init__(self, feature_channels: int) -> None:
        super().__init__()
        self.feature_shape = (feature_channels, *FEATURE_SIZE)
        self.feature_shapes = {"last": self.feature_shape}

    def features(self, images: Tensor, layer: str | None = None) -> Tensor:
        """Raise an `InputError` that says how to get a backbone."""
        raise InputError(
            "The model was imported without a backbone, so it makes no features: expected "
            f"import_original(..., backbone=Backbone('{BACKBONE}', "
            f"image_size={BACKBONE_IMAGE_SIZE})), or the backbone that it was trained with."
        )

    all_features = features_and_logits = classify = logits = features


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
        num_attention_heads: Heads of each attention layer, 8 in Stable Diffusion 1; the tensors'
            shapes do not tell.
        backbone: The classifier that the checkpoint was trained with; `None` leaves it out, so
            that nothing is fetched: the features are then made elsewhere (`AbsentBackbone`).
        prompts: The encoded prompt, from `stable_diffusion.load_prompts`; `None` leaves it out:
            `denoise` then takes a context, and `invert` cannot be called.

    Returns:
        The model in eval mode, float32, on the CPU: frozen UNet and VAE, the original's schedule
        and sampling (50 DDIM steps, guidance 1.75 away from the prompt), features (B, C, h, w) to
        images of 256 px.

    Raises:
        InputError: Missing or corrupt file, tensors missing, left over or of another shape, heads
            that do not divide the channels, or a backbone or prompts that do not fit.
    """
    state = read_state(path)
    try:
        model = convert(state, num_attention_heads, backbone, prompts)
    except KeyError as error:
        raise InputError(
            f"The checkpoint '{path}' is not one of the original FeatInv code: it has no tensor "
            f"{error}; expected keys under {UNET}*, {CONTROLNET}* and {VAE}* (a run of this "
            "project is loaded by FeatInv.load)."
        ) from error
    return model.eval()


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, without running any code that a pickle may hold.

    Raises:
        InputError: Missing file, or one that holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"There is no checkpoint '{path}': expected a .ckpt or .safetensors file of the "
            f"original FeatInv code; {describe_folder(path)}."
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            mmap = zipfile.is_zipfile(path)  # the original's files are several gigabytes
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load has no error of its own for a damaged file
        raise InputError(
            f"The checkpoint '{path}' cannot be read ({type(error).__name__}): expected a whole "
            ".safetensors file, or a .ckpt or .pth file with nothing but tensors and plain values."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def convert(
    state: dict[str, Tensor],
    num_attention_heads: int,
    backbone: Backbone | None = None,
    prompts: Prompts | None = None,
) -> FeatInv:
    """Build a model from the original's state dict.

    Args:
        state: The tensors by their original names.
        num_attention_heads: As for `import_original`.
        backbone: As for `import_original`.
        prompts: As for `import_original`.

    Raises:
        InputError: As `import_original`.
        KeyError: A tensor is missing.
    """
    diffusion = Diffusion()
    if "alphas_cumprod" in state:
        _check_schedule(state["alphas_cumprod"], diffusion)
    state = {key: value for key, value in state.items() if not IGNORED.fullmatch(key)}
    unet = UNet2DConditionModel(**unet_config(state, num_attention_heads))
    vae = AutoencoderKL(**vae_config(state))
    feature_encoder = state[f"{CONTROLNET}input_hint_block.block.1.weight"]
    hidden_channels, feature_channels = feature_encoder.shape[:2]
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
    fill(unet, state, UNET, unet_names(unet))
    fill(model.controlnet, state, CONTROLNET, controlnet_names(unet))
    fill(model.feature_encoder[0], state, CONTROLNET, ENCODER)
    fill(vae, state, VAE, vae_names(vae))
    if state:
        raise InputError(
            f"The checkpoint holds {len(state)} tensors that have no place in the model, the first "
            f"'{min(state)}': expected those of UNet, ControlNet and VAE of the original FeatInv."
        )
    return model


def fill(module: nn.Module, state: dict[str, Tensor], prefix: str, names: dict[str, str]) -> None:
    """Copy every tensor of a module from the original's, taking each out of the state dict.

    Args:
        module: Filled in place, in its own dtype.
        state: The tensors by their original names; those used are removed.
        prefix: Prefix of the module's keys in the state dict.
        names: Original names by ours, of submodules that are called otherwise.

    Raises:
        InputError: A tensor of another shape.
        KeyError: A tensor is missing.
    """
    for name, ours in module.state_dict().items():
        key = prefix + original_name(name, names)
        theirs = state.pop(key)
        # Attention of the VAE: 1x1 convolutions there, linear layers here.
        if theirs.numel() != ours.numel() or theirs.shape[: ours.ndim] != ours.shape:
            raise InputError(
                f"The checkpoint's tensor '{key}' has shape {tuple(theirs.shape)}, expected "
                f"{tuple(ours.shape)}: it is not of the original FeatInv's architecture."
            )
        ours.copy_(theirs.view_as(ours))


# Sizes, read off the tensors


def unet_config(state: dict[str, Tensor], num_attention_heads: int) -> dict:
    """Return the arguments of `UNet2DConditionModel` for the original's UNet.

    Raises:
        InputError: Heads that do not divide the channels.
        KeyError: A tensor is missing.
    """

    def shape(name: str) -> torch.Size:
        return state[f"{UNET}{name}.weight"].shape

    levels = 1 + _count(state, UNET + r"input_blocks\.\d+\.0\.op\.weight")
    layers = _count(state, UNET + r"input_blocks\.\d+\.0\.in_layers\.2\.weight") // levels
    first = [1 + level * (layers + 1) for level in range(levels)]  # a level's first input block
    channels = [shape(f"input_blocks.{i}.0.in_layers.2")[0] for i in first]
    attends = [f"{UNET}input_blocks.{i}.1.proj_in.weight" in state for i in first]
    if num_attention_heads < 1 or any(c % num_attention_heads for c in channels):
        raise InputError(
            f"num_attention_heads is {num_attention_heads}, expected a divisor of the UNet's "
            f"channels {', '.join(map(str, channels))}; Stable Diffusion 1 has 8."
        )
    return {
        "sample_size": IMAGE_SIZE // 8,
        "in_channels": shape("input_blocks.0.0")[1],
        "out_channels": shape("out.2")[0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": [f"{'CrossAttn' * attend}DownBlock2D" for attend in attends],
        "up_block_types": [f"{'CrossAttn' * attend}UpBlock2D" for attend in reversed(attends)],
        "cross_attention_dim": shape("middle_block.1.transformer_blocks.0.attn2.to_k")[1],
        "attention_head_dim": num_attention_heads,  # diffusers' name for the number of heads
    }


def vae_config(state: dict[str, Tensor]) -> dict:
    """Return the arguments of `AutoencoderKL` for the original's VAE.

    Raises:
        KeyError: A tensor is missing.
    """

    def shape(name: str) -> torch.Size:
        return state[f"{VAE}{name}.weight"].shape

    levels = _count(state, VAE + r"encoder\.down\.\d+\.block\.0\.conv1\.weight")
    return {
        "sample_size": IMAGE_SIZE,
        "in_channels": shape("encoder.conv_in")[1],
        "out_channels": shape("decoder.conv_out")[0],
        "latent_channels": shape("post_quant_conv")[0],
        "block_out_channels": [
            shape(f"encoder.down.{level}.block.0.conv1")[0] for level in range(levels)
        ],
        "layers_per_block": _count(state, VAE + r"encoder\.down\.0\.block\.\d+\.conv1\.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _count(keys: Iterable[str], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in keys)


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


# Names: ours (diffusers') -> the original's (latent diffusion's)

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_name(name: str, names: dict[str, str]) -> str:
    """Return a tensor's original name: its longest prefix that is in `names` is replaced."""
    prefix = name
    while prefix and prefix not in names:
        prefix = prefix.rpartition(".")[0]
    return names.get(prefix, "") + name[len(prefix) :]


def unet_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Return the original names of a UNet's submodules, and of those it shares with a ControlNet.

    The original counts blocks through all resolutions, each with its residual block as `.0`,
    attention as `.1`, and the upsampling behind them; a downsampling is a block of its own.
    """
    levels, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
        **_inside("mid_block.resnets.0", "middle_block.0", RESNET),
        **_inside("mid_block.resnets.1", "middle_block.2", RESNET),
    }
    for level in range(levels):
        for layer in range(layers):
            block = f"input_blocks.{1 + level * (layers + 1) + layer}"
            names |= _inside(f"down_blocks.{level}.resnets.{layer}", f"{block}.0", RESNET)
            names[f"down_blocks.{level}.attentions.{layer}"] = f"{block}.1"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = (
            f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        )
        for layer in range(layers + 1):
            block = f"output_blocks.{level * (layers + 1) + layer}"
            names |= _inside(f"up_blocks.{level}.resnets.{layer}", f"{block}.0", RESNET)
            names[f"up_blocks.{level}.attentions.{layer}"] = f"{block}.1"
        attends = "CrossAttn" in unet.config.up_block_types[level]
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"{block}.{1 + attends}.conv"
    return names


def controlnet_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Return the original names of the submodules of a ControlNet made for a UNet."""
    num_blocks = len(unet.config.block_out_channels) * (unet.config.layers_per_block + 1)
    return {
        **unet_names(unet),
        **{f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(num_blocks)},
        "controlnet_mid_block": "middle_block_out.0",
    }


# Original names of the feature encoder's submodules, under the ControlNet's prefix.
ENCODER = {
    "conv_in": "input_hint_block.block.1",
    "conv_mid": "input_hint_block.block.3",
    "conv_out": "input_hint_block.block.5",
}


def vae_names(vae: AutoencoderKL) -> dict[str, str]:
    """Return the original names of a VAE's submodules; the original counts `up` from the end."""
    levels, layers = len(vae.config.block_out_channels), vae.config.layers_per_block
    names = {}
    for part in ("encoder", "decoder"):
        names |= {
            f"{part}.conv_norm_out": f"{part}.norm_out",
            f"{part}.mid_block.resnets.0": f"{part}.mid.block_1",
            f"{part}.mid_block.resnets.1": f"{part}.mid.block_2",
            **_inside(f"{part}.mid_block.attentions.0", f"{part}.mid.attn_1", VAE_ATTENTION),
        }
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for ours, theirs in (
            (f"encoder.down_blocks.{level}", down),
            (f"decoder.up_blocks.{level}", up),
        ):
            for layer in range(layers + 1):
                names[f"{ours}.resnets.{layer}"] = f"{theirs}.block.{layer}"
                names |= _inside(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", VAE_RESNET)
            names[f"{ours}.downsamplers.0.conv"] = f"{theirs}.downsample.conv"
            names[f"{ours}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
    return names


def _inside(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{key}": f"{theirs}.{value}" for key, value in names.items()}
