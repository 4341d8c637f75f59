"""Reads the templates of the pages, once per process: compiling one takes as long as drawing a curve."""

from functools import cache

from jinja2 import Environment, PackageLoader, Template, select_autoescape


@cache
def template(name: str) -> Template:
    """The template in a file of this folder; values that it is filled with are escaped."""
    environment = Environment(
        loader=PackageLoader("cmscale.report", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
