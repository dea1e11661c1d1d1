"""Stable Diffusion 1: its UNet, autoencoder and prompts, from a folder or from the hub."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from featinv.codecs import StableDiffusionVAE
from featinv.utils.errors import InputError, unknown

PROMPTS_FILE = "prompts.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Prompts(nn.Module):
    """The embeddings of two prompts: the one asked for, and the empty one; blank when made.

    Every image is drawn with the same prompt, so it is encoded once and the text encoder is not
    kept.

    Args:
        num_tokens: Tokens of a prompt, with its padding.
        dim: Channels of the text encoder's output.
        prompt: The prompt that is asked for.
    """

    def __init__(self, num_tokens: int = 77, dim: int = 768, prompt: str = "") -> None:
        super().__init__()
        self.prompt = prompt
        self.register_buffer("embeddings", torch.zeros(2, num_tokens, dim))

    def forward(self, keep: Tensor) -> Tensor:
        """Return the context (B, num_tokens, dim): the prompt where `keep`, else the empty one.

        Args:
            keep: bool, shape (B,).
        """
        return self.embeddings[(~keep).long()]

    def save(self, folder: str | Path) -> None:
        """Write the embeddings to a folder, for `load_prompts`."""
        file = str(Path(folder) / PROMPTS_FILE)
        save_file({"embeddings": self.embeddings.contiguous()}, file, {"prompt": self.prompt})


def load_unet(path: str, dtype: str = "float32") -> UNet2DConditionModel:
    """Load the UNet.

    Args:
        path: A folder in the layout of diffusers, or a model's id on the hub.
        dtype: `"float32"`, or `"bfloat16"`: half the memory, and faster under mixed precision,
            for a UNet that is frozen.

    Raises:
        InputError: Neither a whole folder nor to be fetched, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise unknown("dtype of the UNet", dtype, DTYPES)
    load = UNet2DConditionModel.from_pretrained
    return _load(load, path, "unet", torch_dtype=DTYPES[dtype])


def load_vae(path: str) -> StableDiffusionVAE:
    """Load the autoencoder; arguments and errors as for `load_unet`."""
    return StableDiffusionVAE(_load(AutoencoderKL.from_pretrained, path, "vae"))


@torch.no_grad()
def load_prompts(
    path: str, prompt: str = "a high-quality, detailed, and professional image"
) -> Prompts:
    """Encode a prompt and the empty one, or read what `Prompts.save` wrote to the folder.

    Args:
        path: A folder in the layout of diffusers, or a model's id on the hub.
        prompt: The prompt to draw images with; the default is the paper's.

    Raises:
        InputError: As `load_unet`; or the folder holds another prompt, already encoded.
    """
    if (Path(path) / PROMPTS_FILE).is_file():
        return _read_prompts(Path(path) / PROMPTS_FILE, prompt)
    tokenizer = _load(CLIPTokenizer.from_pretrained, path, "tokenizer")
    text_encoder = _load(
        CLIPTextModel.from_pretrained, path, "text_encoder", dtype=torch.float32
    ).eval()
    if len(tokenizer) != text_encoder.config.vocab_size:  # transformers loads an empty folder
        raise InputError(
            f"The tokenizer of '{path}' knows {len(tokenizer)} tokens, but its text encoder "
            f"{text_encoder.config.vocab_size}: expected those of one model, with vocab.json and "
            "merges.txt in tokenizer/."
        )
    length = text_encoder.config.max_position_embeddings
    tokens = tokenizer(
        [prompt, ""], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    prompts = Prompts(length, text_encoder.config.hidden_size, prompt)
    prompts.embeddings.copy_(text_encoder(tokens.input_ids).last_hidden_state)
    return prompts


def _read_prompts(file: Path, prompt: str) -> Prompts:
    with safe_open(file, framework="pt") as tensors:
        held, embeddings = tensors.metadata()["prompt"], tensors.get_tensor("embeddings")
    if held != prompt:
        raise InputError(
            f"The prompt is '{prompt}', but '{file}' holds the encoded prompt '{held}' only: "
            "expected that one, or a folder with tokenizer and text_encoder."
        )
    prompts = Prompts(*embeddings.shape[1:], prompt)
    prompts.embeddings.copy_(embeddings)
    return prompts


def _load(load: Callable, path: str, part: str, **options: object):
    """Load one part of a Stable Diffusion folder by a `from_pretrained`.

    The subfolder of a local folder is given as a path of its own: transformers would look for a
    missing one on the hub.
    """
    try:
        if Path(path).is_dir():
            return load(Path(path, part), local_files_only=True, **options)
        return load(path, subfolder=part, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = (
            f"the folder '{path}' lacks it or it is damaged"
            if Path(path).is_dir()
            else f"there is no such folder, and it could not be fetched from the hub as '{path}'"
        )
        raise InputError(
            f"Stable Diffusion's {part} cannot be loaded: {where} ({type(error).__name__}). "
            "Expected a folder with unet/ and vae/ (each with config.json and "
            "diffusion_pytorch_model.safetensors or .bin), text_encoder/ (config.json, "
            "model.safetensors or pytorch_model.bin) and tokenizer/ (vocab.json, merges.txt, "
            "tokenizer_config.json, special_tokens_map.json): get it where there is a network with "
            "'hf download lambda/miniSD-diffusers --local-dir FOLDER' and set "
            "model.unet.path=FOLDER."
        ) from error
