"""Render a page as one self-contained HTML file: no scripts, no network, light or dark by the reader's setting."""

import jinja2
from markupsafe import Markup

from aggregator.report.chart import COLOURS, svg
from aggregator.report.page import CODE, Page, spaced
from aggregator.report.wording import figure


def render(page: Page) -> bytes:
    """The page as UTF-8. All text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aggregator.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"svg": svg, "colours": COLOURS}
    environment.filters |= {"coded": coded, "figure": figure}
    return environment.get_template("page.html.j2").render(page=page).encode()


def coded(text: str) -> Markup:
    """A text, escaped, with what stands between backticks as code; other backticks are quotation marks."""
    parts = (
        Markup("<code>{}</code>").format(part[1:-1]) if n % 2 else spaced(part).replace("`", "'")
        for n, part in enumerate(CODE.split(text))
    )
    return Markup("").join(parts)
