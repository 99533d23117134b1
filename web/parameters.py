"""Query parameters: those that a route's description does not have are refused, as unknown fields of a body are."""

from __future__ import annotations

from flask import current_app, request

from shared.errors import Invalid
from web.apidoc import query_names
from web.auth import is_open


def refuse_unknown() -> None:
    """Look at the request's parameters.

    Raises:
        Invalid: the route knows no such parameter. A filter that is silently ignored would be taken for one that works.
    """
    if request.endpoint is None or not request.args or is_open():
        return
    known = query_names(current_app.view_functions[request.endpoint])
    for name in request.args:
        if name not in known:
            raise Invalid("There is no such parameter.", code="unknown_parameter", field=name[:64])
