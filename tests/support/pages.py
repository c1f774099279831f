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

    @property
    def reloads(self) -> bool:
        """Whether it loads itself again."""
        return any(meta.get("http-equiv") == "refresh" for meta in self.metas)
