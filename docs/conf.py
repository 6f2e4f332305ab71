"""Settings of the site that `make docs` builds; what the project adds to Sphinx is in `site_extension.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

project = "bros_ref"
copyright = "2026, the authors of bros_ref; Apache-2.0"
extensions = ["sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb",
              "site_extension"]

exclude_patterns = ["files"]  # copies of files that pages link to

html_theme = "furo"
html_title = "bros_ref"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs are those that are committed

toc_object_entries = False  # every page's side bar would list every function: half of the time a build takes

default_role = "literal"  # docstrings write `code` as Markdown does
autodoc_member_order = "bysource"
autodoc_mock_imports = ["vllm"]  # it is not installed where the site is built
autodoc_default_options = {"ignore-module-all": True}  # what a package re-exports is documented where it is defined
napoleon_use_ivar = True  # else the fields of a dataclass are listed twice
apidoc_modules = [{"path": f"../{package}", "destination": f"api/{package}", "max_depth": 2}
                  for package in ("bros_ref", "kernels_cupy")]
suppress_warnings = ["ref.python"]  # a type's name that two modules define, as in `Decoder`
