"""HTML pages from the package's templates."""

from __future__ import annotations

from typing import Any

import jinja2


def render_page(template: str, **values: Any) -> str:
    """Fill a template of ``data/templates``; every value is escaped, none may be missing."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bids_varaug", "data/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
