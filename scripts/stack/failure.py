"""The exception that ends the start of a stack."""

from __future__ import annotations


class StartFailed(Exception):
    """The stack cannot start. The message is shown to the user as it is, one problem per line."""
