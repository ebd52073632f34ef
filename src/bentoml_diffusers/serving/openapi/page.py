"""The page that shows the document: Swagger UI, from files on this machine only."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from bentoml_diffusers import _compat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.requests import Request
    from starlette.routing import BaseRoute

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>%s</title>
<link rel="stylesheet" href="./docs/files/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<div id="page"></div>
<script src="./docs/files/swagger-ui-bundle.js"></script>
<script src="./docs/show.js"></script>
</body>
</html>
"""
# Without an address of a validator: the badge of the default one is an image of a foreign host.
_SCRIPT = """SwaggerUIBundle({
  url: "./docs.json", dom_id: "#page", deepLinking: true, validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout"
});
"""
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'"
)


def make_page_routes(title: str, make: Callable[[], dict[str, Any]]) -> Sequence[BaseRoute]:
    """Returns the routes of the page, at ``/`` and ``/docs``, and of ``/docs.json``.

    Args:
        title: Of the page.
        make: Makes the document.
    """

    async def show_document(request: Request) -> Response:
        del request
        return JSONResponse(make())

    async def show_page(request: Request) -> Response:
        del request
        return HTMLResponse(
            _PAGE % html.escape(title), headers={"content-security-policy": _POLICY}
        )

    async def show_script(request: Request) -> Response:
        del request
        return Response(_SCRIPT, media_type="text/javascript")

    files = StaticFiles(directory=_compat.swagger_folder())
    return [
        Route("/docs.json", show_document),
        Route("/", show_page),
        Route("/docs", show_page),
        Route("/docs/show.js", show_script),
        Mount("/docs/files", files),
    ]
