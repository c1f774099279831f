"""What `status.json` holds, for those who read it: the file may be damaged, or somebody else's."""

from typing import Any

_TEXTS = ("state", "what", "error")
_SITE_TEXTS = ("label", "note")


def is_status(content: Any) -> bool:
    """Whether this is what a coordinator writes of a run, as far as people are shown it."""
    if not isinstance(content, dict) or not isinstance(content.get("sites"), list):
        return False
    texts = all(isinstance(content.get(name), str) for name in _TEXTS)
    counts = all(_is_count(content.get(name)) for name in ("round", "rounds"))
    loss = content.get("heldout_loss", "") is None or _is_number(content.get("heldout_loss"))
    return texts and counts and loss and all(map(_is_site, content["sites"]))


def _is_site(site: Any) -> bool:
    if not isinstance(site, dict):
        return False
    texts = all(isinstance(site.get(name), str) for name in _SITE_TEXTS)
    known = {"number", "examples", "present", "rounds", "pending", "waiting"} <= site.keys()
    return texts and known and (not site["pending"] or _is_number(site["waiting"]))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**53)
