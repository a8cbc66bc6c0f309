"""The site: Sphinx with MyST and the book theme. `make docs` builds it, and a warning is an error there."""

import os
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "_extensions"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "clvr-jax"
author = "The clvr-jax maintainers"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "docstrings",
    "command_pages",
    "api_pages",
]
exclude_patterns = ["_extensions"]
nitpicky = False  # annotations name classes of JAX and PIL, whose references are other sites

myst_enable_extensions = ["deflist", "dollarmath", "colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
smartquotes = False

html_theme = "sphinx_book_theme"
html_title = f"clvr-jax {release}"
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "home_page_in_toc": True}
copybutton_exclude = ".linenos, .gp, .go"
