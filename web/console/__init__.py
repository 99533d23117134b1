"""The console: pages for people, at `/`.

The pages are rendered here from what the JSON API's own functions return. Actions and streams on them are requests to
the JSON API, which the session's cookie and CSRF token authenticate, so scripts can do whatever the console does.
"""

from web.console import job_pages, pages, sign_in, usage_page
from web.console.layout import routes

__all__ = ["job_pages", "pages", "routes", "sign_in", "usage_page"]
