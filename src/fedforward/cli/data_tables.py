"""What `fedforward preview` shows: examples as the model sees them, and what the data amount to."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fedforward.training.data_preview import DataPreview, Shown

#: Characters of a long piece of text that are shown, at its beginning and at its end.
_HEAD, _TAIL = 900, 300
#: Labels, and clients, of a balance that are shown.
_MOST_LABELS, _MOST_CLIENTS = 12, 20
_BAR = 40
#: Around the tokens whose loss counts, for terminals without colour.
OPEN, CLOSE = "«", "»"


def render(found: "DataPreview") -> Iterator[RenderableType]:
    """The parts of a preview, in the order in which people read."""
    for number, example in enumerate(found.shown, start=1):
        yield _example(number, example)
    yield _facts(found)
    yield _lengths(found)
    if any(found.balance):
        yield _balance(found.balance, found.balanced_by)


def _example(number: int, example: "Shown") -> RenderableType:
    text = Text()
    counted = False
    for piece in example.pieces:
        if piece.counted != counted:
            text.append(OPEN if piece.counted else CLOSE, "dim")
            counted = piece.counted
        style = "bold green" if piece.counted else ""
        text.append(_shortened(piece.text), f"{style} reverse" if piece.special else style)
    if counted:
        text.append(CLOSE, "dim")
    if example.answers:
        text.append("\nanswers: ", "dim")
        text.append(" | ".join(map(repr, example.answers)), "bold")
    title = f"example {number}, client {example.client}: {example.tokens} tokens"
    if example.counted:
        title += f", the loss counts {example.counted} (in {OPEN} {CLOSE})"
    return Panel(text, title=Text(title), title_align="left")


def _shortened(text: str) -> str:
    """Text with control characters as escapes, the middle of a long one left out."""
    text = "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)
    if len(text) <= _HEAD + _TAIL:
        return text
    left_out = len(text) - _HEAD - _TAIL
    return f"{text[:_HEAD]} […{left_out:,} characters…] {text[-_TAIL:]}"


def _facts(found: "DataPreview") -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    files = f" ({found.files} files)" if found.files > len(found.sources) else ""
    rows = [("data", ", ".join(found.sources) + files)]
    if found.chat:
        rows.append(("conversations", f"data.chat = {found.chat!r}, by the chat template"))
    clients = found.clients
    among = f"{len(clients)} clients ({min(clients):,} to {max(clients):,} each)"
    rows += [
        ("training", f"{sum(clients):,} examples of {found.rows[0]:,} rows, among {among}"),
        ("held out", f"{found.heldout:,} examples of {found.rows[1]:,} rows"),
        ("an example ends with", repr(found.end) if found.end else "nothing: no end token"),
        ("tokens that count", f"{found.counted:.1f} of an example, on average"),
    ]
    for what, tally in zip(("training", "held-out"), found.tallies, strict=True):
        for reason, count in tally.dropped.most_common():
            rows.append(("left out", f"{count:,} {what} rows: {reason}"))
        if tally.cut:
            limit = f"data.sequence_length = {found.sequence_length}"
            rows.append(("cut", f"{tally.cut:,} {what} answers, at {limit}"))
        if tally.crossed:
            why = "a token reaches from the prompt into the answer"
            rows.append(("seam", f"in {tally.crossed:,} {what} rows {why}"))
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _lengths(found: "DataPreview") -> Table:
    table = Table(title="tokens of training examples", title_justify="left", box=None)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("examples", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    bars = found.histogram()
    most = max(count for _, _, count in bars)
    for least, last, count in bars:
        name = str(least) if least == last else f"{least}-{last}"
        table.add_row(name, f"{count:,}", "#" * -(-_BAR * count // most))
    return table


def _balance(balance: Sequence[Mapping[str, int]], by: str) -> Table:
    total: dict[str, int] = {}
    for part in balance:
        for label, count in part.items():
            total[label] = total.get(label, 0) + count
    labels = sorted(total, key=lambda label: (-total[label], label))
    shown, others = labels[:_MOST_LABELS], labels[_MOST_LABELS:]
    table = Table(title=Text(f"examples by {by}"), title_justify="left")
    table.add_column("client", justify="right")
    for label in shown:
        table.add_column(Text(label or "(none)"), justify="right")
    if others:
        table.add_column(f"{len(others)} others", justify="right")
    rows = [(str(n), part) for n, part in enumerate(balance[:_MOST_CLIENTS])]
    for name, part in [*rows, ("all", total)]:
        more = [sum(part.get(label, 0) for label in others)] if others else []
        counts = [part.get(label, 0) for label in shown] + more
        table.add_row(name, *(f"{count:,}" for count in counts))
    if len(balance) > _MOST_CLIENTS:
        table.caption = f"the first {_MOST_CLIENTS} of {len(balance)} clients"
    return table
