"""What a site says when it will not do something: a code and names of keys, and no more.

The sentence that a server shows is made from these two alone. What is wrong in words may quote a
row, a path or a name, and stays in the site's own log.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from fedforward.core.errors import MessageError

#: Keys that a refusal names at most, and characters of one.
MAX_KEYS, MAX_KEY_CHARACTERS = 8, 40
#: Bytes of a refusal.
MAX_REFUSAL_BYTES = 512
_KEY = re.compile(r"[a-z]+\.[a-z_]+")


class RefusalCode(StrEnum):
    """Why a site refuses."""

    #: The terms are beyond the site's limits.
    LIMITS = "limits"
    #: The terms do not fit each other, or what the site's own file says.
    TERMS = "terms"
    #: The site's data cannot be used on these terms.
    DATA = "data"
    #: The site's model, or a file that belongs to it, cannot be used on these terms.
    MODEL = "model"
    MEMORY = "memory"
    #: The message is damaged, of another version, or not one that a site answers.
    MESSAGE = "message"
    #: An error that was not foreseen.
    UNFORESEEN = "unforeseen"


_SENTENCES = {
    RefusalCode.LIMITS: "The limits of this site do not allow these terms",
    RefusalCode.TERMS: "These terms cannot be carried out at this site",
    RefusalCode.DATA: "The data of this site cannot be used on these terms",
    RefusalCode.MODEL: "The model of this site cannot be used on these terms",
    RefusalCode.MEMORY: "There is not enough memory at this site for what was asked",
    RefusalCode.MESSAGE: "This site could not use what it was sent; it may be of another release",
    RefusalCode.UNFORESEEN: "Something failed at this site that was not foreseen",
}


@dataclass(frozen=True)
class Refusal:
    """The body of a REFUSAL.

    Attributes:
        code: why.
        keys: of the configuration, as `section.key`; names that the program knows, no values.

    Example:
        >>> Refusal(RefusalCode.LIMITS, ("lora.rank",)).sentence
        "The limits of this site do not allow these terms (lora.rank). The site's own log says why."
    """

    code: RefusalCode
    keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, code: RefusalCode, keys: Iterable[str]) -> "Refusal":
        """With as many of the keys as a refusal may have, each once."""
        return cls(code, tuple(dict.fromkeys(keys))[:MAX_KEYS])

    @property
    def sentence(self) -> str:
        """What people at the server read."""
        keys = f" ({', '.join(self.keys)})" if self.keys else ""
        return f"{_SENTENCES[self.code]}{keys}. The site's own log says why."

    def encode(self) -> bytes:
        """JSON: the code, and the keys."""
        return json.dumps({"code": self.code, "keys": self.keys}, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, body: bytes) -> "Refusal":
        """Raises `MessageError` for anything but a code and keys."""
        try:
            if len(body) > MAX_REFUSAL_BYTES:
                raise ValueError
            content = json.loads(body)
            code, keys = RefusalCode(content["code"]), content["keys"]
            well_formed = (
                isinstance(keys, list)
                and len(keys) <= MAX_KEYS
                and set(content)
                == {
                    "code",
                    "keys",
                }
            )
            if not well_formed or not all(map(_is_key, keys)):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise MessageError(
                "A site's refusal cannot be read: it is no code with keys."
            ) from error
        return cls(code, tuple(keys))


def _is_key(text: object) -> bool:
    return isinstance(text, str) and len(text) <= MAX_KEY_CHARACTERS and bool(_KEY.fullmatch(text))
