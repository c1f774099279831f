"""How often tokens differ when prompt and answer are tokenised apart and when they are one text.

    python benchmarks/seams.py --data FILE.jsonl QUESTION ANSWER [--tokenizers FOLDER ...]

For every tokenizer (the folders given, and three that are trained here on the rows: byte-level BPE,
BPE after a space as SentencePiece has it, Unigram) and three ways to write the templates, the share
of rows whose tokens are not those of the whole text when the parts are tokenised apart, and the
share in which a token reaches over the seam. `run` makes the tokens of the whole text in all rows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import common
from common import Column, Row

from fedforward.data.encoding import TextEncoder

DEMO = Path(__file__).parent.parent / "src" / "fedforward" / "demo"
#: Prompt and answer around question and answer: the space is the answer's, nobody's, the prompt's.
FORMS = {
    "Q: {q}\\nA:| {a}": ("Q: {q}\nA:", " {a}"),
    "### Answer:\\n|{a}": ("### Question:\n{q}\n\n### Answer:\n", "{a}"),
    "A: |{a}": ("Q: {q}\nA: ", "{a}"),
}
COLUMNS = (
    Column("tokenizer", "tokenizer"),
    Column("form", "prompt|answer"),
    Column("rows", "rows", ","),
    Column("apart_differs", "apart differs, %", ".1f"),
    Column("crossed", "a token over the seam, %", ".1f"),
    Column("run_differs", "ours differs, %", ".1f"),
)


def trained(kind: str, texts: list[str]) -> Any:
    """A tokenizer of 2,000 tokens, trained on texts."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<unk>"]
    size = 2000
    if kind == "byte-level BPE":
        made = tk.Tokenizer(tk.models.BPE())
        made.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer: Any = tk.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "BPE after a space":
        made = tk.Tokenizer(tk.models.BPE(unk_token="<unk>"))
        made.normalizer = tk.normalizers.Sequence(
            [tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")]
        )
        # Words alone are learnt, as SentencePiece does.
        made.pre_tokenizer = tk.pre_tokenizers.Split("▁", "merged_with_next")
        trainer = tk.trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, show_progress=False
        )
    else:
        made = tk.Tokenizer(tk.models.Unigram())
        made.pre_tokenizer = tk.pre_tokenizers.Metaspace()
        trainer = tk.trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def measure(name: str, tokenizer: Any, form: str, pairs: list[tuple[str, str]]) -> Row:
    """One tokenizer on one way to write the templates."""
    before, after = FORMS[form]
    prompts = [before.format(q=q) for q, _ in pairs]
    answers = [after.format(a=a) for _, a in pairs]
    whole = [p + a for p, a in zip(prompts, answers, strict=True)]

    def plain(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    wanted = plain(whole)
    apart = [p + a for p, a in zip(plain(prompts), plain(answers), strict=True)]
    encoder = TextEncoder(tokenizer)
    ours = encoder.encode(whole, [[len(p)] for p in prompts], prefix=False, end=False)
    count = len(pairs)
    differs = sum(one != other for one, other in zip(apart, wanted, strict=True))
    wrong = sum(one.tokens.tolist() != other for one, other in zip(ours, wanted, strict=True))
    return {
        "tokenizer": name,
        "form": form,
        "rows": count,
        "apart_differs": 100 * differs / count,
        "crossed": 100 * sum(one.crossed[0] for one in ours) / count,
        "run_differs": 100 * wrong / count,
    }


def rows_of(given: list[str] | None, most: int) -> list[tuple[str, str]]:
    """Questions and answers of a file, or of the demonstration."""
    if given is None:
        from fedforward.demo.text import site_examples

        found = site_examples(seed=0, per_site=max(1, most // 4))
        return [(str(row["question"]), str(row["answer"])) for row in found][:most]
    path, question, answer = given
    lines = Path(path).read_text(encoding="utf-8").splitlines()[:most]
    read = [json.loads(line) for line in lines]
    return [(str(row[question]), str(row[answer])) for row in read]


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", nargs=3, metavar=("FILE", "QUESTION", "ANSWER"))
    parser.add_argument("--tokenizers", nargs="*", default=[str(DEMO / "model")])
    parser.add_argument("--rows", type=int, default=2000)
    given: argparse.Namespace = parser.parse_args(arguments)
    common.prepare(given)
    from transformers import AutoTokenizer

    pairs = rows_of(given.data, 40 if given.quick else given.rows)
    texts = [f"{q} {a}" for q, a in pairs]
    made = {Path(folder).name: AutoTokenizer.from_pretrained(folder) for folder in given.tokenizers}
    kinds = ("byte-level BPE", "BPE after a space", "Unigram")
    made |= {f"{kind}, trained": trained(kind, texts) for kind in kinds}
    found = [
        measure(name, tokenizer, form, pairs) for name, tokenizer in made.items() for form in FORMS
    ]
    common.finish(given, "seams", found, COLUMNS)


if __name__ == "__main__":
    main()
