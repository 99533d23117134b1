"""Downloads models from the Hugging Face hub: weights, configuration and tokenizer, but no code and no pickles."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
from huggingface_hub import HfApi, errors, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it has no __all__
    build_hf_headers,
    disable_progress_bars,
    logging,
)

from scripts.lib.progress import Progress, ProgressBar
from scripts.model_files.download import RemoteFile, download
from scripts.model_files.manifest import Origin, is_intact, read_origin, write_manifest
from scripts.model_files.space import check_space
from scripts.model_files.staging import staged
from shared.models.folder import PICKLES, ModelError, check_config, check_folder

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_WANTED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*")
_NESTED = ("1_Pooling/config.json",)
"""Files in subfolders: how an embedding model makes a vector of an input."""
_WEIGHTS = ".safetensors"
_UNREACHABLE = (httpx2.TransportError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)


def is_ready(target: Path, repository: str, revision: str | None) -> bool:
    """Whether `target` contains a repository at a revision (None: at any)."""
    origin = read_origin(target)
    if origin is None or origin.source != repository:
        return False
    return revision in (None, origin.revision, origin.requested) and is_intact(target)


def fetch(target: Path, repository: str, revision: str | None, progress: type[Progress] = ProgressBar) -> None:
    """Download into `target`, continuing an interrupted download.

    Args:
        progress: reports the progress.

    Raises:
        ModelError: the download failed, the model cannot be served, or the disk is too small.
    """
    # The library would show a progress bar per file and log each retry.
    disable_progress_bars()
    logging.set_verbosity(ERROR)
    with _readable_errors(repository):
        api = HfApi()
        info: ModelInfo = api.model_info(repository, revision=revision, files_metadata=True)
        _refuse_pickles(repository, info)
        # By commit, not by branch: a continued download must not mix two versions.
        url = partial(hf_hub_url, repository, revision=info.sha, endpoint=api.endpoint)
        with staged(target, resumable=True) as folder:
            files = _files(info)
            _download(f"Downloading {repository}", url, files, folder, progress)
            check_folder(folder)
            known = {file.name: file.sha256 for file in files if file.sha256}
            write_manifest(folder, Origin(repository, info.sha or "", requested=revision or ""), known)


def _files(info: ModelInfo) -> list[RemoteFile]:
    """Return the files to download. Weights come last: smaller files may show that the model is not supported."""
    wanted = [file for file in info.siblings or [] if _is_wanted(file.rfilename)]
    if without_size := [file.rfilename for file in wanted if file.size is None]:
        raise ModelError(f"the hub does not state the size of {without_size[0]}")
    files = [
        RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else "", file.blob_id or "")
        for file in wanted
    ]
    return sorted(files, key=lambda file: (file.name.endswith(_WEIGHTS), file.size))


def _download(
    label: str, url: Callable[[str], str], files: list[RemoteFile], folder: Path, progress: type[Progress]
) -> None:
    """Download the missing files into a folder and remove all others."""
    _keep_only(folder, {file.name for file in files} | {file.partial(folder).name for file in files})
    missing = [file for file in files if not file.is_in(folder)]
    for file in missing:
        (folder / file.name).unlink(missing_ok=True)
    total = sum(file.size for file in files)
    check_space(folder, total - _bytes_in(folder))
    known = f"; {_bytes_in(folder) / total:.0%} already downloaded" if _bytes_in(folder) else ""
    headers = build_hf_headers()
    with progress(f"{label} ({total / 1e9:.2f} GB{known})", total) as bar:
        for file in files:
            if file.name.endswith(_WEIGHTS):
                check_config(folder)
            if file in missing:
                download(url(file.name), headers, file, folder, lambda: bar.update(_bytes_in(folder)))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_wanted(name: str) -> bool:
    # Subfolders of repositories contain the same weights in other formats.
    return name in _NESTED or ("/" not in name and any(fnmatch(name, pattern) for pattern in _WANTED))


def _refuse_pickles(repository: str, info: ModelInfo) -> None:
    names = [file.rfilename for file in info.siblings or []]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{repository} has its weights only as pickle files ({pickles[0]}), which can run code: refused"
        )


def _keep_only(folder: Path, names: set[str]) -> None:
    """Remove the files of another revision."""
    names = {name.partition("/")[0] for name in names}
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _readable_errors(repository: str) -> Iterator[None]:
    """Convert the hub's exceptions to errors with one line."""
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
