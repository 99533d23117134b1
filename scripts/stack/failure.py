"""The one exception of starting a stack."""

from __future__ import annotations


class StartFailed(Exception):
    """Why a start cannot go on: one line for a person, printed as it is."""
