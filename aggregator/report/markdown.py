"""Weekly artifacts as Markdown, from the templates beside this file."""

from typing import Any

import jinja2

from aggregator.report import wording


def render(name: str, **values: Any) -> bytes:
    """The template ``name``.md.j2 filled in."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aggregator.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        keep_trailing_newline=True,
    )
    for function in (wording.count, wording.share, wording.ms, wording.gb, wording.money, wording.span):
        environment.filters[function.__name__] = function
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(f"{name}.md.j2").render(**values).encode()
