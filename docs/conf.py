"""Configuration of the documentation site (``make docs``)."""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("NO_ET", "1")  # no version check by nipype
os.environ.setdefault("MPLBACKEND", "Agg")

from bids_varaug import __version__

project = "bids_varaug"
author = "The bids_varaug developers"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
highlight_language = "none"  # of blocks that name no language: shell commands and formulas

# Headings of three levels can be linked to: outputs.md#images
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and units, which types cannot
numpydoc_show_class_members = False

# The tutorials are scripts that run when the site is built; each is also offered as a notebook.
sphinx_gallery_conf = {
    "examples_dirs": ["../examples/tutorials"],
    "gallery_dirs": ["tutorials/notebooks"],
    "filename_pattern": "/plot_",
    "abort_on_example_error": True,
    "backreferences_dir": None,
    "download_all_examples": False,
    "min_reported_time": 1e9,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
}
suppress_warnings = ["config.cache"]
warnings.filterwarnings("ignore", category=DeprecationWarning)

html_theme = "furo"
html_title = f"bids_varaug {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
