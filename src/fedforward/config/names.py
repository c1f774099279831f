"""The names that a configuration may choose from: built in, or registered by a plug-in.

The registries of methods, estimators and so on call `register`; the configuration asks `known`.
Imports nothing but the standard library, so that a plug-in's name costs no PyTorch.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

Kind = Literal[
    "method", "estimator", "objective", "metric", "aggregator", "report-filter", "runtime"
]

_SCORES = ("accuracy", "exact-match", "f1", "rougeL")
#: Names that the package itself brings, by kind.
BUILT_IN: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {
        "method": ("fedmezo", "decomfl", "zorba", "fedkseed", "fedkseed-pro", "fedavg"),
        "estimator": ("two-point", "fzoo"),
        "objective": ("loss", *_SCORES),
        "metric": ("loss", "perplexity", *_SCORES),
        "aggregator": ("mean",),
        "report-filter": (),
        "runtime": ("flower",),
    }
)
#: Names that plug-ins have added, by kind. Only `register` writes here.
REGISTERED: dict[Kind, tuple[str, ...]] = {}
#: Kinds that also take a user's function, as `package.module:function`.
_FUNCTIONS: tuple[Kind, ...] = ("objective", "metric")
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def known(kind: Kind) -> tuple[str, ...]:
    """All names of a kind: the built-in ones first, then the registered ones in their order."""
    return BUILT_IN[kind] + REGISTERED.get(kind, ())


def register(kind: Kind, name: str) -> None:
    """Add a name that configurations may use from now on; a known name is left as it is.

    Raises:
        ValueError: there is no such kind, or the name has other characters than letters, digits,
            "-", "_" and ".".
    """
    if kind not in BUILT_IN:
        raise ValueError(
            f"{kind!r} is not a kind of name; the kinds are {', '.join(map(repr, get_args(Kind)))}"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, flags=re.ASCII):
        raise ValueError(
            f"{name!r} cannot name {_article(kind)}: letters, digits, '-', '_' and '.' are "
            "allowed, and a letter or digit in front"
        )
    if name not in known(kind):
        REGISTERED[kind] = (*REGISTERED.get(kind, ()), name)


def check(kind: Kind, name: str) -> str:
    """The name, if it is known.

    Raises:
        ValueError: it is not; the message has the nearest known name, and all of them.
    """
    names, functions = known(kind), kind in _FUNCTIONS
    if name in names or (functions and _FUNCTION.fullmatch(name)):
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name!r} is not known.{hint} {allowed(kind)}")


def allowed(kind: Kind) -> str:
    """What is allowed for a kind, without a full stop."""
    names = known(kind)
    if not names:
        return f"There is no {kind.replace('-', ' ')} yet: a plug-in has to register one"
    own = ", or a function of your own as 'package.module:function'" if kind in _FUNCTIONS else ""
    return f"Allowed {'is' if len(names) == 1 else 'are'} {', '.join(map(repr, names))}{own}"


@dataclass(frozen=True)
class Known:
    """`check` for one kind, as a function of the name alone: a validator of a field."""

    kind: Kind

    def __call__(self, name: str) -> str:
        """See `check`."""
        return check(self.kind, name)


def _article(kind: Kind) -> str:
    return f"{'an' if kind[0] in 'aeo' else 'a'} {kind.replace('-', ' ')}"
