"""Writes every setting with its default into `.env.example` and the table of README.md.

    python -m scripts.docs.settings

A test holds both against `shared.settings`, so that they cannot be forgotten.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from shared.settings import ROOT, Settings

README = ROOT / "README.md"
EXAMPLE = ROOT / ".env.example"
TABLE_HEAD = "| variable | default | meaning |\n| --- | --- | --- |\n"
_TABLE = re.compile(re.escape(TABLE_HEAD) + r"(\|.*\n)*")
_EXAMPLE_HEAD = """\
# Every variable with its default. scripts/serve writes a .env (mode 600) with the secrets on its first run;
# copy from here what you want to change. The environment wins over the file. Times are seconds, sizes bytes.
"""


@dataclass(frozen=True, slots=True)
class Variable:
    """A setting as people see it."""

    name: str
    default: str
    meaning: str


def variables() -> list[Variable]:
    """All settings, in the order of their class."""
    return [
        Variable(name.upper(), _shown(field.default), field.description or "")
        for name, field in Settings.model_fields.items()
    ]


def _shown(default: object) -> str:
    match default:
        case SecretStr():
            return default.get_secret_value()
        case Path():
            return str(default.relative_to(ROOT))
        case None:
            return ""
        case bool():
            return str(default).lower()
        case float():
            return f"{default:g}"
        case _:
            return str(default)


def table() -> str:
    """The README's table."""
    rows = (f"| `{v.name}` | {f'`{v.default}`' if v.default else ''} | {v.meaning} |\n" for v in variables())
    return TABLE_HEAD + "".join(rows)


def example() -> str:
    """The text of `.env.example`."""
    return _EXAMPLE_HEAD + "".join(f"\n# {v.meaning}\n{_as_comment(v)}{v.name}={v.default}\n" for v in variables())


def _as_comment(variable: Variable) -> str:
    """A MODEL_PATH that is set wins over the catalog, whatever it is set to."""
    return "# " if variable.name == "MODEL_PATH" else ""


def main() -> None:
    """Rewrite both files."""
    EXAMPLE.write_text(example())
    README.write_text(_TABLE.sub(lambda _: table(), README.read_text()))


if __name__ == "__main__":
    main()
