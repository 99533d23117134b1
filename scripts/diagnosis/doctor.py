"""`scripts/doctor`: checks this machine, the settings, Redis and the models, and prints a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from scripts.diagnosis.archive import check_archive
from scripts.diagnosis.configuration import check_models, check_ports, read_settings, smallest_text_model
from scripts.diagnosis.machine import check_disks, check_machine, check_packages
from scripts.diagnosis.redis_server import check_redis
from scripts.diagnosis.report import Section, as_json, as_markdown
from scripts.diagnosis.self_check import run_self_check
from shared.models.catalog import Catalog
from shared.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report.

    Args:
        arguments: command-line arguments; None: those of this process.

    Returns:
        The exit status: 0 if there is no problem, otherwise 1.
    """
    options = _parser().parse_args(arguments)
    sections = _examine(generate=not options.no_model, timeout_s=options.timeout)
    print(as_json(sections) if options.json else as_markdown(sections))
    return int(any(section.problems for section in sections))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/doctor",
        description="Checks this machine, the settings, Redis and the models, and prints a report that can be pasted "
        "into a bug report. It contains no key, password or URL. Exit status 1 if something is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--no-model", action="store_true", help="do not load a model and generate with it")
    parser.add_argument(
        "--timeout", type=float, default=180, metavar="SECONDS", help="time limit of the self-check (default: 180)"
    )
    return parser


def _examine(*, generate: bool, timeout_s: float) -> list[Section]:
    settings, configured = read_settings()
    models, catalog = _models(settings)
    smallest = smallest_text_model(catalog) if catalog else None
    return [
        check_machine(),
        check_packages(),
        run_self_check(smallest.path if smallest else None, generate=generate, timeout_s=timeout_s),
        configured,
        *(_guarded(title, check, settings) for title, check in _CHECKS.items()),
        models,
    ]


_CHECKS: dict[str, Callable[[Settings], Section]] = {
    "Disk": check_disks,
    "Redis": check_redis,
    "Archive": check_archive,
    "Ports": check_ports,
}


def _guarded(title: str, check: Callable[[Settings], Section], settings: Settings) -> Section:
    """Run a check. One that fails must not hide what the others find."""
    try:
        return check(settings)
    except Exception as error:  # noqa: BLE001 - the report has to be complete
        return _failed(title, error)


def _models(settings: Settings) -> tuple[Section, Catalog | None]:
    try:
        return check_models(settings)
    except Exception as error:  # noqa: BLE001 - the report has to be complete
        return _failed("Models", error), None


def _failed(title: str, error: Exception) -> Section:
    # Messages of unexpected errors may contain a value that must not be published.
    return Section(title, problems=[f"this check failed with {type(error).__name__}; report it as a bug"])
