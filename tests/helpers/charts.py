"""The charts of a page, as a browser would read them."""

import io
import json
from html.parser import HTMLParser

import pandas as pd


class Parsed(HTMLParser):
    """Every tag with its attributes, as a browser reads them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)

    def charts(self):
        """Specifications, with the rows of each as a table under `rows`."""
        specs = [json.loads(attrs["data-spec"]) for _, attrs in self.tags if "data-spec" in attrs]
        return [spec | {"rows": rows(spec)} for spec in specs]


def rows(spec):
    """The values that a chart shows at the pointer."""
    text = io.StringIO(spec["data"]["values"])
    numbers = [name for name, kind in spec["data"]["format"]["parse"].items() if kind == "number"]
    table = pd.read_csv(text, dtype=str, keep_default_na=False)
    return table.assign(**{name: pd.to_numeric(table[name]) for name in numbers})
