"""Export to folders for diffusers' own classes, and import of the original's checkpoints."""

from dataclasses import asdict
from pathlib import Path

from diffusers import ControlNetModel, DDIMScheduler

from featinv.backbones import Backbone
from featinv.checkpoints import FOLDER, MODEL_FILE, save_model
from featinv.codecs import StableDiffusionVAE
from featinv.interop.official import BACKBONE, BACKBONE_IMAGE_SIZE, import_original
from featinv.interop.stable_diffusion import load_prompts
from featinv.models.featinv import FeatInv
from featinv.utils.errors import InputError
from featinv.utils.tensor_files import save_tensors

FEATURE_CONV_FILE = "feature_conv.safetensors"

README = """\
# A FeatInv for diffusers

Exported from `{source}`: {backbone}, layer `{layer}`, {conditioning} features of shape
(B, {channels}, h, w) to images of {image_size} px. `unet/`, `controlnet/`{vae} and `scheduler/` are
for diffusers' own classes. diffusers' ControlNet embeds its condition by two convolutions, FeatInv
by three: the first one is in `{conv_file}`, and is applied before.{pooling}

```python
from pathlib import Path

from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn.functional import conv2d, interpolate, pixel_unshuffle, silu

folder = Path("{folder}")
unet = UNet2DConditionModel.from_pretrained(folder / "unet")
controlnet = ControlNetModel.from_pretrained(folder / "controlnet")
conv = load_file(folder / "{conv_file}")
{load_context}

def predict(z_t, timesteps, features, context):  # {prediction_type}, as scheduler/ says
    size = [{fold} * side for side in z_t.shape[-2:]]
    condition = interpolate(features, size, mode="bilinear", align_corners=False)
    condition = pixel_unshuffle(condition, {fold})  # positions to channels
    condition = silu(conv2d(condition, conv["weight"], conv["bias"], padding=1))
    down, mid = controlnet(
        z_t, timesteps, context, controlnet_cond=condition, return_dict=False
    )
    return unet(
        z_t,
        timesteps,
        context,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
```
"""
POOLING = """
Average the features over their positions, and copy the average to each, before."""
LOAD_CONTEXT = """\
# (2, tokens, dim): the prompt, and the empty prompt of the unconditional branch
context = load_file(folder / "prompts.safetensors")["embeddings"]
"""


def export_model(path: str | Path, folder: str | Path) -> None:
    """Write a trained model as a folder that diffusers' own classes load.

    The folder holds `unet/`, `controlnet/`, `scheduler/` (noise schedule and prediction type),
    `vae/` or `codec.safetensors` (`PatchPCA`), `feature_conv.safetensors`, `prompts.safetensors` if
    there are prompts, and a README.md with the code of the prediction, which is the same bit for
    bit. (Load a bfloat16 UNet with `torch_dtype=torch.bfloat16` and run it under autocast.)

    Args:
        path: The model, as for `FeatInv.load`.
        folder: Folder to write, new or empty.

    Raises:
        InputError: No such FeatInv, a prior, a model of several layers, or a folder that is in use.
    """
    model = FeatInv.load(path)
    if model.controlnet is None:
        raise InputError(
            f"'{path}' is a prior without a ControlNet: expected a run with conditioning=spatial "
            "or pooled; its UNet is already diffusers' (FeatInv.load(path).unet)."
        )
    if len(model.backbone.layers) > 1:
        raise InputError(
            f"'{path}' inverts the layers {', '.join(model.backbone.layers)}, but diffusers' "
            "ControlNet can hold only one: expected a run with one layer."
        )
    folder = _empty_folder(folder)
    _save_frozen(model, folder)
    DDIMScheduler(**model.diffusion.scheduler_config).save_pretrained(folder / "scheduler")
    _save_controlnet(model, folder)
    has_vae = isinstance(model.codec, StableDiffusionVAE)
    text = README.format(
        source=path,
        backbone=model.backbone.name,
        layer=model.backbone.layer,
        conditioning=model.conditioning,
        channels=model.backbone.feature_shape[0],
        image_size=model.image_size,
        prediction_type=model.diffusion.prediction_type,
        vae=", `vae/`" if has_vae else "",
        folder=folder,
        conv_file=FEATURE_CONV_FILE,
        fold=model.feature_encoder[0].fold,
        pooling=POOLING if model.conditioning == "pooled" else "",
        load_context=LOAD_CONTEXT if model.prompts is not None else "",
    )
    (folder / "README.md").write_text(text)


def _save_controlnet(model: FeatInv, folder: Path) -> None:
    """Save as diffusers' class, whose condition embedding is our last two convolutions."""
    (encoder,), controlnet = model.feature_encoder, model.controlnet
    hidden = encoder.conv_in.out_channels
    theirs = ControlNetModel.from_config(
        {
            **controlnet.config,
            "conditioning_channels": hidden,
            "conditioning_embedding_out_channels": (hidden,),
        }
    )
    embedding = theirs.controlnet_cond_embedding
    embedding.conv_in.load_state_dict(encoder.conv_mid.state_dict())
    embedding.conv_out.load_state_dict(encoder.conv_out.state_dict())
    state = {f"controlnet_cond_embedding.{k}": v for k, v in embedding.state_dict().items()}
    theirs.load_state_dict(controlnet.state_dict() | state)
    theirs.save_pretrained(folder / "controlnet")
    save_tensors(folder / FEATURE_CONV_FILE, encoder.conv_in.state_dict())


def _save_frozen(model: FeatInv, folder: Path) -> None:
    model.unet.save_pretrained(folder / "unet")
    if isinstance(model.codec, StableDiffusionVAE):
        model.codec.vae.save_pretrained(folder / "vae")
    else:
        save_tensors(folder / "codec.safetensors", model.codec.state_dict())
    if model.prompts is not None:
        model.prompts.save(folder)


def import_checkpoint(
    path: str | Path,
    folder: str | Path,
    num_attention_heads: int = 8,
    stable_diffusion: str | None = None,
    backbone_weights: str | None = None,
) -> None:
    """Turn a checkpoint of the original code into a folder that `FeatInv.load` reads.

    Args:
        path: As for `featinv.interop.official.import_original`.
        folder: Folder to write, new or empty; it will hold all weights but the backbone's.
        num_attention_heads: As for `import_original`.
        stable_diffusion: Folder or hub id of a Stable Diffusion 1, whose text encoder encodes the
            prompt; None leaves the prompt out (then pass a context to `FeatInv.denoise`).
        backbone_weights: `"timm"` (the hub) or a file; None leaves the backbone out (then pass
            features computed elsewhere to `FeatInv.invert`).

    Raises:
        InputError: As `import_original` and `load_prompts`, or a folder that is in use.
    """
    options = {"name": BACKBONE, "weights": backbone_weights, "image_size": BACKBONE_IMAGE_SIZE}
    backbone = Backbone(**options) if backbone_weights else None
    prompts = load_prompts(stable_diffusion) if stable_diffusion else None
    model = import_original(path, num_attention_heads, backbone, prompts)
    folder = _empty_folder(folder)
    _save_frozen(model, folder)
    model.config = {
        "_target_": "featinv.models.FeatInv",
        "image_size": model.image_size,
        "conditioning": model.conditioning,
        "train_unet": False,
        "hidden_channels": model.feature_encoder[0].conv_in.out_channels,
        "cond_drop_prob": model.cond_drop_prob,
        "backbone": {"_target_": "featinv.backbones.Backbone", **options}
        if backbone_weights
        else {
            "_target_": "featinv.interop.official.AbsentBackbone",
            "feature_channels": model.backbone.feature_shape[0],
        },
        "codec": {"_target_": "featinv.interop.stable_diffusion.load_vae", "path": FOLDER},
        "unet": {"_target_": "featinv.interop.stable_diffusion.load_unet", "path": FOLDER},
        "diffusion": {"_target_": "featinv.diffusion.Diffusion"},
        "sampler": {"_target_": "featinv.sampling.SamplerConfig", **asdict(model.sampler)},
    }
    if model.prompts is not None:
        model.config["prompts"] = {
            "_target_": "featinv.interop.stable_diffusion.load_prompts",
            "path": FOLDER,
            "prompt": model.prompts.prompt,
        }
    save_model(model, folder / MODEL_FILE)


def _empty_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' is in use: expected a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
