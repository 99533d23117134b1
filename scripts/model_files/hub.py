"""Downloading a model from the Hugging Face hub: weights, configuration, tokenizer; never code, never pickles."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
from huggingface_hub import HfApi, errors, snapshot_download
from huggingface_hub.utils.tqdm import disable_progress_bars

from scripts.model_files.manifest import Origin, is_intact, read_origin, write_manifest
from scripts.model_files.space import check_space
from scripts.model_files.staging import staged
from shared.model_folder import PICKLES, ModelError, check_folder

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_WANTED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*")
_UNREACHABLE = (httpx2.TransportError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)


def is_ready(target: Path, repository: str, revision: str | None) -> bool:
    """Whether `target` holds that repository, at that revision (None: at any)."""
    origin = read_origin(target)
    if origin is None or origin.source != repository:
        return False
    return revision in (None, origin.revision, origin.requested) and is_intact(target)


def fetch(target: Path, repository: str, revision: str | None) -> None:
    """Download into `target`; what an interrupted download has is used by the next one.

    Raises:
        ModelError: it cannot be had, is not a model that can be served, or does not fit on the disk.
    """
    with _explained(repository):
        info: ModelInfo = HfApi().model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if _is_wanted(file.rfilename)}
        _refuse_pickles(repository, info)
        if not sys.stderr.isatty():
            disable_progress_bars()
        with staged(target, resumable=True) as folder:
            have = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            check_space(folder, sum(sizes.values()) - have)
            # By commit, not by branch: a download that goes on tomorrow must not mix two versions.
            snapshot_download(repository, revision=info.sha, local_dir=folder, allow_patterns=list(sizes))
            _keep_only(folder, set(sizes))
            check_folder(folder)
            write_manifest(folder, Origin(repository, info.sha or "", requested=revision or ""))


def _is_wanted(name: str) -> bool:
    # Folders inside a repository hold the same weights once more, in other formats.
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _WANTED)


def _refuse_pickles(repository: str, info: ModelInfo) -> None:
    names = [file.rfilename for file in info.siblings or []]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{repository} has its weights only as pickle files ({pickles[0]}), which can run code: refused"
        )


def _keep_only(folder: Path, names: set[str]) -> None:
    """Drop the download's own bookkeeping, and what a download of another revision left."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn the hub's exceptions into one line each."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(f"{repository} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repository} has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model {repository}, or it is private (set HF_TOKEN)") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{repository} is neither a folder nor a hub id (ORGANISATION/NAME)") from error
    except errors.HfHubHTTPError as error:
        raise ModelError(f"the hub answered with an error for {repository}: {error.response.status_code}") from error
    except _UNREACHABLE as error:
        raise ModelError(f"cannot download {repository}: the hub cannot be reached") from error
