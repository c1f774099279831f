"""Reading and tokenising rows, beside plain `datasets`: seconds and memory.

    python benchmarks/data.py [--rows 1000000] [--gigabytes 5 --limit 10000] [--tokenizer FOLDER]

Makes a JSONL file of questions and answers in a scratch folder, and reads it in processes of their
own: ours (`CorpusReader.corpus`: rows as written, whole texts with seams, everything on disk), and
plain `datasets` (`load_dataset` and a batched `map` that tokenises prompt and answer in one text).
Both tokenise alike. Memory is the peak of the process above what it holds once libraries and
tokenizer are loaded. With `--gigabytes` the file has that size and ours alone reads it, once with
`data.limit` and, with `--whole`, once without.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
from common import Column, Reach, Row

DEMO = Path(__file__).parent.parent / "src" / "fedforward" / "demo" / "model"
COLUMNS = (
    Column("way", "read by"),
    Column("rows", "rows", ","),
    Column("examples", "examples", ","),
    Column("megabytes", "file, MB", ",.0f"),
    Column("seconds", "seconds", ".1f"),
    Column("rows_per_second", "rows a second", ",.0f"),
    Column("peak_megabytes", "memory above libraries, MB", ",.0f"),
)
#: A file larger than memory is read within so many MB.
MOST_MEGABYTES = Reach("<=", 500.0)
PROMPT, ANSWER = "### Question:\n{question}\n\n### Answer:\n", "{answer}"
CHILD = """
import sys
sys.path.insert(0, {here!r})
import data
data.{way}({source!r}, {tokenizer!r}, {limit})
"""


def write(path: Path, rows: int | None, size: int) -> int:
    """Write rows until there are so many, or so many bytes; returns how many there are."""
    written = count = 0
    with path.open("w", encoding="utf-8") as file:
        for line in _lines(rows):
            written += file.write(line)
            count += 1
            if rows is None and written >= size:
                break
    return count


def _lines(rows: int | None) -> Iterator[str]:
    number = 0
    while rows is None or number < rows:
        one, two = number % 9973, number % 7919
        question = f"A farm has {one} sheep and buys {two} more. How many sheep has it then?"
        steps = " ".join(f"Step {n}: {one} + {n} is {one + n}." for n in range(number % 7))
        row = {"question": question, "answer": f"{steps} It has {one + two} sheep.", "id": number}
        yield json.dumps(row) + "\n"
        number += 1


def ours(source: str, tokenizer: str, limit: int | None) -> None:
    """Read and tokenise as a run does, and print what it took."""
    import datasets  # noqa: F401
    import flwr_datasets.partitioner  # noqa: F401
    from transformers import AutoTokenizer

    from fedforward.config.method_sections import FederationSection
    from fedforward.config.sections import DataSection, EvaluationSection
    from fedforward.data.corpus import CorpusReader

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    data = DataSection(
        source=source, prompt=PROMPT, answer=ANSWER, heldout=100, limit=limit, sequence_length=256
    )
    with _Peak() as peak:
        reader = CorpusReader(data, EvaluationSection(), FederationSection(clients=4), 0)
        corpus = reader.corpus(loaded, None)
        examples = sum(map(len, corpus.clients)) + len(corpus.heldout)
        corpus.clients[0][len(corpus.clients[0]) // 2]
    peak.tell(examples)


def datasets(source: str, tokenizer: str, limit: int | None) -> None:
    """Read and tokenise with plain `datasets`, and print what it took."""
    import datasets as library
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    library.disable_progress_bars()

    def tokenised(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        pairs = zip(batch["question"], batch["answer"], strict=True)
        texts = [PROMPT.format(question=q) + ANSWER.format(answer=a) for q, a in pairs]
        return {"input_ids": loaded(texts, add_special_tokens=False)["input_ids"]}

    with _Peak() as peak, tempfile.TemporaryDirectory() as cache:
        table = library.load_dataset("json", data_files=source, split="train", cache_dir=cache)
        table = table.map(tokenised, batched=True, remove_columns=table.column_names)
        assert len(table[len(table) // 2]["input_ids"])
        peak.tell(len(table))


class _Peak:
    """Seconds, and the peak of resident memory above that at the start."""

    def __enter__(self) -> "_Peak":
        import psutil

        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self, examples: int) -> None:
        """Print both as JSON."""
        import resource

        seconds = time.perf_counter() - self._begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._before
        # Pages of a memory map count as resident though the system may take them back.
        print(json.dumps({"examples": examples, "seconds": seconds, "peak": max(0, peak)}))


def measure(way: str, source: Path, rows: int, tokenizer: str, limit: int | None) -> Row:
    """Read a file in a process of its own."""
    here = str(Path(__file__).parent)
    code = CHILD.format(here=here, way=way, source=str(source), tokenizer=tokenizer, limit=limit)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        common.stop(f"reading with {way} failed: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout.strip().split("\n")[-1])
    name = way if limit is None else f"{way}, data.limit = {limit:,}"
    return {
        "way": name,
        "rows": rows,
        "examples": found["examples"],
        "megabytes": source.stat().st_size / 1e6,
        "seconds": found["seconds"],
        "rows_per_second": rows / found["seconds"],
        "peak_megabytes": found["peak"] / 1e6,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--gigabytes", type=float, default=0.0)
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--whole", action="store_true", help="also without data.limit")
    parser.add_argument("--tokenizer", default=str(DEMO))
    given: argparse.Namespace = parser.parse_args(arguments)
    common.prepare(given)
    count = 300 if given.quick else given.rows
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "rows.jsonl"
        if given.gigabytes:
            rows = write(source, None, int(given.gigabytes * 1e9))
            ways = [("ours", given.limit)] + ([("ours", None)] if given.whole else [])
        else:
            rows = write(source, count, 0)
            ways = [("ours", None), ("datasets", None)]
        for way, limit in ways:
            common.note(f"{way}, limit {limit}")
            row = measure(way, source, rows, given.tokenizer, limit)
            if given.gigabytes:
                row["reaches"] = {"peak_megabytes": MOST_MEGABYTES}
            found.append(row)
    common.finish(given, "data", found, COLUMNS)


if __name__ == "__main__":
    main()
