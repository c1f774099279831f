"""What all parties of a federation must have in common."""

from dataclasses import dataclass

from fedforward.core.layout import Layout


@dataclass(frozen=True)
class ModelIdentity:
    """What all parties must agree on before any of them can read another's numbers.

    Attributes:
        layout: of the tunable space.
        base: SHA-256 of the base model's weights, hexadecimal.
        classes: of a sequence classifier, in the order of its head; else empty.
        state_bytes: of the tuned tensors, which a snapshot carries.
        tokenizer: SHA-256 of what it makes of texts, hexadecimal; empty where one is shared.
        adapter: SHA-256 of the adapter that the tuned tensors begin with; empty if they are new.
        initial_a: SHA-256 of the file with the A that adapters begin with; empty if it is random.
        mask: SHA-256 of the file that says which tuned weights move; empty if there is none.
    """

    layout: Layout
    base: str
    classes: tuple[str, ...]
    state_bytes: int
    tokenizer: str = ""
    adapter: str = ""
    initial_a: str = ""
    mask: str = ""
