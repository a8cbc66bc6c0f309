"""HTML pages of results: templates in which every value is escaped unless the template itself says otherwise."""

from functools import cache
from importlib import resources
from typing import Any

import jinja2


def render_page(package: str, name: str, **values: Any) -> str:
    """Renders a template of a package.

    Args:
      package: that holds the template, such as "clvr_jax.reasoning".
      name: file name of the template.
      values: for the template. Texts, numbers and everything else are escaped where they are inserted, so that nothing
        that a model, a user or a file says becomes markup or a script.
    Raises: jinja2.UndefinedError for a value that the template uses and nobody gave.
    """
    return _template(package, name).render(**values)


@cache
def _template(package: str, name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(resources.files(package).joinpath(name).read_text(encoding="utf-8"))
