"""The helper process that checks constraints: `python -P -m shared.constraints.helper`.

See `shared.tokenizing.helper`, whose protocol and limits it has. A schema that makes llguidance crash, or take too much
time or memory, affects only this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.constraints.grammar import ConstraintRefused, check
from shared.errors import JobFailure
from shared.jobs.request import Constraint
from shared.tokenizing.helper import Reply, Tokenizers, peak_bytes, serve


def check_all(request: Mapping[str, Any]) -> Reply:
    """The operation `check`: check the constraints of a request.

    Args:
        request: `constraints` has (kind, source) of each.

    Returns:
        Header: if one cannot be honoured, its `index` and the reason (`message`).
    """
    for index, fields in enumerate(request["constraints"]):
        try:
            check(Constraint(*fields))
        except (ConstraintRefused, MemoryError, RecursionError) as error:
            reason = str(error) if isinstance(error, ConstraintRefused) else "it is too complex"
            return {"error": JobFailure.CONSTRAINT, "message": reason, "index": index}, b""
    return {}, b""


if __name__ == "__main__":
    check(Constraint("json_object"))  # loads what every check needs
    _memory = Tokenizers()  # has none: it only records how much memory the process had
    _memory.peak_bytes = peak_bytes()
    serve({"check": check_all}, _memory)
