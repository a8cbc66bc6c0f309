"""HTML pages of results, from templates in which every value is escaped unless the template marks it as safe."""

from functools import cache
from importlib import resources

import jinja2


def render_page(package: str, name: str, **values: object) -> str:
    """Renders a template of a package.

    Args:
      package: contains the template, such as "clvr_jax.reasoning.trajectories".
      name: file name of the template.
      values: for the template. All values are escaped, so that no text of a model, a user or a file becomes markup or a
        script.
    Raises: jinja2.UndefinedError for a value that the template uses and that is not given.
    """
    return _template(package, name).render(**values)


@cache
def read_text(package: str, name: str) -> str:
    """Returns a text file of a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


@cache
def _template(package: str, name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(read_text(package, name))
