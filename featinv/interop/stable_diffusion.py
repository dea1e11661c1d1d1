"""Stable Diffusion 1: its UNet, autoencoder and prompts, from a folder or from the hub."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from featinv.codecs import StableDiffusionVAE
from featinv.utils.downloads import cache_if_unreachable
from featinv.utils.errors import InputError, unknown
from featinv.utils.tensor_files import read_tensors, save_tensors

PROMPTS_FILE = "prompts.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Prompts(nn.Module):
    """The embeddings of a prompt and of the empty prompt; zeros until they are loaded.

    All images share the prompt: it is encoded once, and the text encoder is dropped.

    Args:
        num_tokens: Tokens of a prompt, padding included.
        dim: Channels of the text encoder's output.
        prompt: The prompt of training.
        sampling_prompt: The prompt of sampling; `None` for the same one.
    """

    def __init__(
        self,
        num_tokens: int = 77,
        dim: int = 768,
        prompt: str = "",
        sampling_prompt: str | None = None,
    ) -> None:
        super().__init__()
        self.prompt, self.sampling_prompt = prompt, sampling_prompt
        self.register_buffer("embeddings", torch.zeros(len(self.texts), num_tokens, dim))

    @property
    def texts(self) -> list[str]:
        """The prompts in the order of their embeddings."""
        texts = [self.prompt, ""]
        return texts if self.sampling_prompt is None else [*texts, self.sampling_prompt]

    def forward(self, keep: Tensor, sampling: bool = False) -> Tensor:
        """Return the context (B, num_tokens, dim): the prompt where `keep`, else the empty one.

        Args:
            keep: bool, shape (B,).
            sampling: Whether to use the prompt of sampling.
        """
        prompt = 2 if sampling and self.sampling_prompt is not None else 0
        return self.embeddings[torch.where(keep, prompt, 1)]

    def save(self, folder: str | Path) -> None:
        """Write the embeddings to a folder, for `load_prompts`."""
        metadata = {"prompt": self.prompt}
        if self.sampling_prompt is not None:
            metadata["sampling_prompt"] = self.sampling_prompt
        save_tensors(Path(folder) / PROMPTS_FILE, {"embeddings": self.embeddings}, metadata)


def load_unet(path: str, dtype: str = "float32") -> UNet2DConditionModel:
    """Load the UNet.

    Args:
        path: A folder in the layout of diffusers, or a model's id on the hub.
        dtype: `"float32"`, or `"bfloat16"` for a frozen UNet: half the memory, and faster under
            mixed precision.

    Raises:
        InputError: No complete folder and nothing on the hub, or an unknown dtype.
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
    path: str,
    prompt: str = "a high-quality, detailed, and professional image",
    sampling_prompt: str | None = None,
) -> Prompts:
    """Encode a prompt and the empty one, or read those of `Prompts.save` in the folder.

    Args:
        path: As for `load_unet`.
        prompt: Of training; the default is the paper's.
        sampling_prompt: Of sampling, if it differs.

    Raises:
        InputError: As `load_unet`; or the folder holds another encoded prompt.
    """
    if (Path(path) / PROMPTS_FILE).is_file():
        return _read_prompts(Path(path) / PROMPTS_FILE, prompt, sampling_prompt)
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
    prompts = Prompts(length, text_encoder.config.hidden_size, prompt, sampling_prompt)
    tokens = tokenizer(
        prompts.texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    prompts.embeddings.copy_(text_encoder(tokens.input_ids).last_hidden_state)
    return prompts


def _read_prompts(file: Path, prompt: str, sampling_prompt: str | None) -> Prompts:
    held = read_tensors(file, "prompts", "Prompts.save", ("embeddings", "prompt"))
    embeddings = held["embeddings"]
    for name, expected in (("prompt", prompt), ("sampling_prompt", sampling_prompt)):
        if held.get(name) != expected:
            raise InputError(
                f"The {name} is '{expected}', but '{file}' holds only '{held.get(name)}', encoded: "
                "expected that one, or a folder with tokenizer and text_encoder."
            )
    prompts = Prompts(*embeddings.shape[1:], prompt, sampling_prompt)
    prompts.embeddings.copy_(embeddings)
    return prompts


def _load(load: Callable, path: str, part: str, **options: object):
    """Load one part of Stable Diffusion by its `from_pretrained`.

    A local subfolder is given as a path: transformers would look for a missing one on the hub.
    """
    try:
        if Path(path).is_dir():
            return load(Path(path, part), local_files_only=True, **options)
        with cache_if_unreachable():
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
