"""Downloads: the model hub and torch.hub, which fail fast, or use their cache, when offline."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

from featinv.utils.errors import InputError

PREFIX = "hf://"  # of a path that names a model on the hub
SECONDS = 3.0  # a server that takes longer to answer counts as unreachable
NO_PICKLES = ["*.safetensors", "*.json", "*.txt"]  # all that is ever fetched


def fetch(repo_id: str) -> Path:
    """Download a model from the hub, or find it in the cache; only files that cannot run code.

    Args:
        repo_id: `owner/name`, with an optional prefix `hf://` and suffix `@revision`.

    Returns:
        The folder with its files, which `FeatInv.load` takes.

    Raises:
        InputError: No such model, or the hub cannot be reached and the cache has no copy.
    """
    name, _, revision = repo_id.removeprefix(PREFIX).partition("@")
    check_repo_id(name)
    try:
        with cache_if_unreachable():
            folder = snapshot_download(name, revision=revision or None, allow_patterns=NO_PICKLES)
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise describe_hub_error(error, name) from error
    return Path(folder)


def check_repo_id(repo_id: str) -> None:
    """Raise an `InputError` unless a name has the form owner/name."""
    with suppress(HFValidationError):
        validate_repo_id(repo_id)
        if repo_id.count("/") == 1:
            return
    raise InputError(f"'{repo_id}' is not the name of a model on the hub: expected owner/name.")


def describe_hub_error(error: Exception, repo_id: str) -> InputError:
    """Describe an error of huggingface_hub in one sentence."""
    hub = constants.ENDPOINT
    if isinstance(error, LocalEntryNotFoundError):
        return out_of_reach(f"'{repo_id}' is not in the cache")
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return InputError(
            f"The hub {hub} has no model '{repo_id}' of that revision, or it is private: expected "
            "an existing owner/name, or a login with 'hf auth login'."
        )
    return InputError(
        f"The hub {hub} refuses the request for '{repo_id}': {' '.join(str(error).split())}"
    )


def out_of_reach(what: str) -> InputError:
    """Return the error of an unreachable hub; `what` is the clause that says what follows."""
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it does not answer"
    return InputError(
        f"The hub {constants.ENDPOINT} cannot be reached ({offline}) and {what}: "
        "expected a network, or a file or folder on this machine."
    )


@contextmanager
def cache_if_unreachable() -> Iterator[None]:
    """Within the block, take files from the cache alone if the hub does not answer.

    huggingface_hub would retry every file for most of a minute. Honours `HF_HUB_OFFLINE` and
    `HF_ENDPOINT`.
    """
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def reachable() -> bool:
    """Return whether a hub answers within `SECONDS`; asked at most once a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    return _answers(constants.ENDPOINT, int(time.monotonic() // 60))


def check_download(url: str) -> None:
    """Raise a `ConnectionError` at once if torch.hub neither has a file nor can download it."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    if not cached.is_file() and not _answers(url, int(time.monotonic() // 60)):
        raise ConnectionError(f"{url} does not answer")


@lru_cache(maxsize=8)
def _answers(url: str, minute: int) -> bool:
    answers: list[int] = []

    def ask() -> None:
        with suppress(Exception):  # proxy, host name, TLS: all mean unreachable
            answers.append(get_session().head(url, timeout=SECONDS).status_code)

    # In a thread, since no timeout covers the lookup of the host name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return bool(answers)
