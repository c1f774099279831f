"""Text becomes the tokens that the tokenizer makes of the whole of it."""

from pathlib import Path
from typing import Any

import pytest

from fedforward.data.encoding import TextEncoder, affixes, missing_end
from tests.conftest import DEMO_MODEL
from tests.support.corpora import Letters

SENTENCES = [
    "the cat sat",
    "it is 12 or 3.5",
    "naïve “quotes” … 日本",
    "a  b\n\nc\td",
    "don't",
    "un",
]


def trained(kind: str, **around: Any) -> Any:
    """A small tokenizer of one of the three families, trained on a few sentences."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<unk>"]
    if kind == "bytes":
        made = tk.Tokenizer(tk.models.BPE())
        made.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tk.decoders.ByteLevel()
        alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = tk.trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, initial_alphabet=alphabet
        )
    elif kind == "sentencepiece":
        # As Llama 2 has it: a space before the text, and words joined to the space before them.
        made = tk.Tokenizer(tk.models.BPE(unk_token="<unk>", byte_fallback=True))
        made.normalizer = tk.normalizers.Sequence(
            [tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")]
        )
        made.decoder = tk.decoders.Replace("▁", " ")
        trainer = tk.trainers.BpeTrainer(vocab_size=120, special_tokens=special)
    else:
        made = tk.Tokenizer(tk.models.Unigram())
        made.pre_tokenizer = tk.pre_tokenizers.Metaspace()
        made.decoder = tk.decoders.Metaspace()
        trainer = tk.trainers.UnigramTrainer(
            vocab_size=110, special_tokens=special, unk_token="<unk>"
        )
    made.train_from_iterator(SENTENCES * 20, trainer)
    if around:
        made.post_processor = tk.processors.TemplateProcessing(
            single=around["single"], special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram"])
def test_every_seam_of_every_text_gives_the_tokens_of_the_whole(kind: str) -> None:
    tokenizer = trained(kind)
    encoder = TextEncoder(tokenizer)
    crossed = 0
    for text in SENTENCES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for seam in range(len(text) + 1):
            (found,) = encoder.encode([text], [[seam]])
            assert found.tokens.tolist() == [*ids, tokenizer.eos_token_id]
            (place,), (crosses,) = found.places, found.crossed
            before = tokenizer.decode(ids[:place]).lstrip(" ")
            # The tokens before the seam say no more than the prompt, and all of it unless one
            # reaches over the seam. (Bytes of a cut letter decode to a replacement mark.)
            if "�" not in before and "<unk>" not in before:
                assert text.startswith(before) and len(before) <= seam
                assert crosses or len(before) == seam or kind != "bytes"
            crossed += crosses
    assert crossed


def test_prefix_and_end_are_there_once() -> None:
    tokenizer = Letters(prefix=(0, 1), suffix=(3, 2))
    encoder = TextEncoder(tokenizer)
    assert (encoder.prefix, encoder.suffix, encoder.end) == ((0, 1), (3, 2), (3, 2))
    for text in ("ab", "\0\1ab", "ab\3\2", "ab\3", "\0\1ab\3\2", "ab\2"):
        (found,) = encoder.encode([text], [[len(text)]])
        shown = tokenizer.decode(found.tokens)
        assert shown in ("^^ab$$", "^^ab$"), text
        assert tokenizer.decode(encoder.texts([text])[0]) == shown
    assert tokenizer.decode(encoder.prompt("ab")) == "^^ab"
    assert tokenizer.decode(encoder.prompt("\0\1ab")) == "^^ab"
    assert tokenizer.decode(encoder.prompt("")) == "^^"
    assert tokenizer.decode(encoder.prompt("ab", prefix=False)) == "ab"


@pytest.mark.parametrize(
    ("single", "prefix", "suffix", "end"),
    [
        ("<s> $A", (0,), (), (1,)),
        ("<s> <s> $A", (0, 0), (), (1,)),
        ("<s> $A </s>", (0,), (1,), (1,)),
        ("$A <s>", (), (0,), (0, 1)),
        ("$A", (), (), (1,)),
    ],
)
def test_what_a_tokenizer_adds_is_found(
    single: str, prefix: tuple[int, ...], suffix: tuple[int, ...], end: tuple[int, ...]
) -> None:
    tokenizer = trained("bytes", single=single)
    encoder = TextEncoder(tokenizer)
    assert (encoder.prefix, encoder.suffix, encoder.end) == (prefix, suffix, end)
    for text in ("the cat", "<s>the cat", "the cat</s>", "<s>the cat</s>"):
        (found,) = encoder.encode([text], [[0]])
        tokens = found.tokens.tolist()
        if 0 not in suffix:
            assert tokens.count(0) == max(prefix.count(0), text.count("<s>"))
        assert tokens[-1] == 1 and tokens.count(1) == 1


def test_a_tokenizer_that_adds_in_the_middle_adds_nothing_here() -> None:
    class Odd(Letters):
        def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            found = super().__call__(text, add_special_tokens)
            ids = found["input_ids"]
            return {"input_ids": [*ids[:1], 7, *ids[1:], 7]} if add_special_tokens else found

    assert affixes(Odd()) == ((), ())


@pytest.mark.parametrize(
    ("ids", "end", "missing"),
    [
        ([5], (3, 2), (3, 2)),
        ([5, 3], (3, 2), (2,)),
        ([5, 3, 2], (3, 2), ()),
        ([5, 2], (3, 2), ()),
        ([], (2,), (2,)),
        ([5], (), ()),
    ],
)
def test_missing_ends(ids: list[int], end: tuple[int, ...], missing: tuple[int, ...]) -> None:
    assert missing_end(ids, end) == missing


def test_the_demonstration_tokenizer_has_no_prefix() -> None:
    from transformers import AutoTokenizer

    encoder = TextEncoder(AutoTokenizer.from_pretrained(str(Path(DEMO_MODEL))))
    assert (encoder.prefix, encoder.end) == ((), (2,))
