"""What a page is made of, read as a browser would."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags of a page, and what they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.figures: list[dict[str, str | None]] = []
        self.metas: list[dict[str, str | None]] = []
        #: Words of the legends.
        self.legends: list[str] = []
        self._in_legend = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.loaded += [str(found[key]) for key in ("src", "href", "xlink:href") if key in found]
        self.ids += [str(found["id"])] if "id" in found else []
        if found.get("class") == "picture":
            self.figures.append(found)
        if tag == "meta":
            self.metas.append(found)
        self._in_legend = self._in_legend or found.get("class") == "legend"

    def handle_endtag(self, tag: str) -> None:
        self._in_legend = self._in_legend and tag != "ul"

    def handle_data(self, data: str) -> None:
        if self._in_legend and data.strip():
            self.legends.append(data.strip())

    @property
    def reloads(self) -> bool:
        """Whether it loads itself again."""
        return any(meta.get("http-equiv") == "refresh" for meta in self.metas)
