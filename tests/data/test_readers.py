"""Rows of files are what the files say, in every form, or the line is named."""

import datetime
import decimal
import gzip
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedforward.core.errors import FedForwardError
from fedforward.data import readers
from fedforward.data.sources import find
from fedforward.data.values import reach, text_of
from tests.support.corpora import read, write_rows

ROWS = [{"q": "a, b", "a": "1"}, {"q": "“é”", "a": "2"}, {"q": "x", "a": "NA"}]


def packed(data: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        # Files that were appended to one another are one.
        return gzip.compress(data[:20], mtime=0) + gzip.compress(data[20:], mtime=0)
    if name.endswith(".zst"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return bytes(sink.getvalue())
    return data


def content(name: str) -> bytes:
    if ".json" in name and ".jsonl" not in name:
        text = json.dumps(ROWS, indent=1)
    elif "json" in name:
        text = "\n".join(json.dumps(row) for row in ROWS)
    else:
        mark = "," if ".csv" in name else "\t"
        text = f"q{mark}a\n" + "".join(f'"{row["q"]}"{mark}{row["a"]}\n' for row in ROWS)
    return packed(text.encode(), name)


# Brackets and a star are letters of a name here, though they make patterns elsewhere.
@pytest.mark.parametrize(
    "name",
    [
        "d.jsonl",
        "d.ndjson",
        "d.json",
        "d.csv",
        "d.tsv",
        "D.JSONL",
        "d[1]*.jsonl",
        "d.jsonl.gz",
        "d.csv.gz",
        "d.json.zst",
        "d.tsv.zst",
    ],
)
def test_every_form_of_text_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content(name.lower()))
    assert read(path) == ROWS
    source = find(str(path), key="data.source")
    assert source.count() == 3 and source.columns() == ["q", "a"]


def tables(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.stem == "stream":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table, max_chunksize=2)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table, max_chunksize=2)


TABLES = ["d.parquet", "d.arrow", "stream.arrow", "d.feather"]


@pytest.mark.parametrize("name", TABLES)
def test_every_form_of_table_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    tables(tmp_path / name, pa.Table.from_pylist(ROWS))
    assert read(tmp_path / name) == ROWS
    source = find(str(tmp_path / name), key="data.source")
    assert source.count() == 3 and source.columns() == ["q", "a"]
    assert [row for _, _, row in source.read(["a"])] == [{"a": row["a"]} for row in ROWS]


WRITTEN = ["5", "4.5", "1e3", "-0.0", "100000000000000000000", "1E+2", "0.10", "12345678901.5"]


def test_numbers_of_json_stay_as_they_are_written(tmp_path: Path) -> None:
    lines = [f'{{"a": {number}, "b": {{"c": [{number}]}}}}' for number in WRITTEN]
    for path in (
        write_rows(tmp_path / "d.jsonl", lines),
        write_rows(tmp_path / "d.json", ["[" + ",\n".join(lines) + "]"]),
        write_rows(tmp_path / "w.json", ['{"data": [' + ",\n".join(lines) + "]}"]),
    ):
        rows = read(path)
        assert [text_of(row["a"], "a", "") for row in rows] == WRITTEN
        assert [row["b"]["c"][0] for row in rows] == WRITTEN


def test_words_of_json_and_dates_stay(tmp_path: Path) -> None:
    said = ["2024-01-31", "2024-01-31T05:00:00", "NA", "None", "", " 00004 ", "nan", "true"]
    rows = read(write_rows(tmp_path / "d.jsonl", [{"a": word} for word in said]))
    assert [text_of(row["a"], "a", "") for row in rows] == said
    rows = read(write_rows(tmp_path / "e.jsonl", ['{"a": true}', '{"a": null}', '{"a": NaN}']))
    assert [text_of(row["a"], "a", "") for row in rows] == ["true", None, "NaN"]


def test_cells_of_csv_are_text(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(
        b'\xef\xbb\xbfq,a\r\n00004,NA\r\n5,\r\n1e3,None\r\n\r\n"two\nlines","a ""b"""\r\n'
        + b"x,"
        + b"y" * 200_000
        + b"\r\n"
    )
    found = [tuple(row.values()) for row in read(path)]
    assert found[:3] == [("00004", "NA"), ("5", ""), ("1e3", "None")]
    assert found[3] == ("two\nlines", 'a "b"') and len(found[4][1]) == 200_000


MOMENT = datetime.datetime(2024, 1, 31, 5, 0, 0, 120_000)
BERLIN = pa.timestamp("us", tz="Europe/Berlin")


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (pa.date32(), datetime.date(2024, 1, 31), "2024-01-31"),
        (pa.timestamp("s"), datetime.datetime(2024, 1, 31), "2024-01-31T00:00:00"),
        (pa.timestamp("ns"), MOMENT, "2024-01-31T05:00:00.12"),
        (pa.timestamp("us", tz="UTC"), MOMENT, "2024-01-31T05:00:00.12Z"),
        (BERLIN, MOMENT.replace(tzinfo=datetime.UTC), "2024-01-31T06:00:00.12+01:00"),
        (pa.time64("ns"), datetime.time(5, 7), "05:07:00"),
        (pa.decimal128(20, 3), decimal.Decimal("100000000000.500"), "100000000000.500"),
        (pa.bool_(), True, "true"),
        (pa.int64(), 2**62, str(2**62)),
        (pa.uint8(), 7, "7"),
        (pa.float64(), 0.1, "0.1"),
        (pa.float64(), 5.0, "5.0"),
        (pa.float32(), 0.1, "0.1"),
        (pa.float16(), 0.5, "0.5"),
        (pa.large_string(), "x", "x"),
        (pa.dictionary(pa.int8(), pa.string()), "word", "word"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_values_of_tables_have_their_documented_form(
    tmp_path: Path, kind: pa.DataType, value: Any, text: str, name: str
) -> None:
    if name == "d.parquet" and kind == pa.timestamp("s"):
        pytest.skip("Parquet has no seconds")
    column = (
        pa.array([value, None], kind)
        if not pa.types.is_dictionary(kind)
        else pa.array([value, None]).dictionary_encode()
    )
    nested = pa.StructArray.from_arrays([column], ["x"])
    listed = pa.ListArray.from_arrays(pa.array([0, 1, 2]), column)
    tables(tmp_path / name, pa.table({"a": column, "s": nested, "l": listed}))
    first, second = read(tmp_path / name)
    assert text_of(first["a"], "a", "") == text and second["a"] is None
    assert text_of(first["s"]["x"], "x", "") == text and second["s"]["x"] is None
    assert text_of(first["l"][0], "l", "") == text and second["l"] == [None]


@pytest.mark.parametrize("name", TABLES)
def test_two_columns_of_one_name_are_refused_where_they_are_used(tmp_path: Path, name: str) -> None:
    one, two, three = (pa.array([word]) for word in "xyz")
    tables(tmp_path / name, pa.table([one, two, three], names=["a", "a", "q"]))
    (row,) = read(tmp_path / name)
    assert reach(row, "q", "") == "z"
    with pytest.raises(FedForwardError, match="has the key 'a' more than once"):
        reach(row, "a", "row 1")


def test_an_array_on_one_line_takes_time_in_proportion(tmp_path: Path) -> None:
    import time

    seconds = []
    for count in (20_000, 160_000):
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps([{"q": "x" * 20, "n": n} for n in range(count)]), "utf-8")
        begun = time.perf_counter()
        assert sum(1 for _ in read_lazily(path)) == count
        seconds.append(time.perf_counter() - begun)
    assert seconds[1] < 24 * seconds[0]


def read_lazily(path: Path) -> Any:
    return find(str(path), key="data.source").read()


def test_a_line_that_is_blank_is_none_in_every_count(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"q": 1}\n \n{"q": 2}\n')
    assert find(str(path), key="k").count() == len(read(path)) == 2
    path = tmp_path / "d.csv"
    path.write_text("\nq,a\n1,2\n", encoding="utf-8")
    source = find(str(path), key="k")
    assert source.columns() == ["q", "a"] and source.count() == 1


def test_a_file_that_grows_is_read_as_far_as_it_was(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"q": n} for n in range(5)])
    assert len(list(find(str(path), key="k").read(None, [True, False]))) == 1


def test_moments_in_maps_and_lists(tmp_path: Path) -> None:
    kinds = [
        pa.map_(pa.string(), pa.timestamp("us")),
        pa.list_(pa.timestamp("us"), 1),
        pa.large_list(pa.timestamp("us")),
    ]
    values: list[Any] = [[[("k", MOMENT)]], [[MOMENT]], [[MOMENT]]]
    columns = [pa.array(value, kind) for value, kind in zip(values, kinds, strict=True)]
    tables(tmp_path / "d.arrow", pa.table(columns, names=["m", "f", "l"]))
    (row,) = read(tmp_path / "d.arrow")
    assert row == {"m": {"k": TEXT}, "f": [TEXT], "l": [TEXT]}


TEXT = "2024-01-31T05:00:00.12"


def json_file(text: str) -> tuple[str, bytes]:
    return "d.json", text.encode()


REFUSED: list[tuple[str, bytes, list[str]]] = [
    ("d.jsonl", b'{"q":1}\n\n{"q":\n', ["line 3 of", "is not a JSON object", "one whole"]),
    ("d.jsonl", b'{"q":"1"}\n{"q":"\xff"}\n', ["line 2 of", "is not UTF-8", "Save the file"]),
    ("d.jsonl", '{"q": 1}'.encode("utf-16"), ["is UTF-16", "Save the file as UTF-8"]),
    ("d.csv", "q,a".encode("utf-16-le"), ["zero bytes"]),
    ("d.csv", b"q,a\n1,2\n\xff,2\n", ["line 3 of", "is not UTF-8"]),
    ("d.jsonl", b'{"q":"1"}\n["q"]\n', ["line 2 of", "is an array"]),
    ("d.jsonl", b"3\n4\n", ["line 1 of", "is a number"]),
    ("d.jsonl", b'{"q":"1"}\nnull\n"x"\n', ["line 2 of", "is null"]),
    ("d.jsonl", b"[" * 100_000, ["line 1 of", "nested too deeply"]),
    (*json_file('[{"q": 1},\n {"q": }]'), ["line 2 of", "is not JSON", "column 8"]),
    (*json_file('[{"q": 1}\n {"q": 2}]'), ["line 2 of", ", or ] is expected"]),
    (*json_file('[{"q": 1},\n'), ["an object is expected"]),
    (*json_file('[{"q": 1}] 3'), ["something follows the array"]),
    (*json_file('[{"q": 1},\n 7]'), ["the item at line 2", "is a number"]),
    (*json_file('[{"q": 1},,{"q": 2}]'), ["an object is expected"]),
    (*json_file("7"), ["begins with '7'"]),
    (*json_file('{"q": ["x", "y"], "a": ["1", "2"]}'), ["holds columns (q, a)", "by rows"]),
    (*json_file('{"q": {"0": "x"}, "a": {"0": "1"}}'), ["holds columns (q, a)", "orient"]),
    (*json_file('{"data": [{"q": 1}], "rows": [{"q": 1}]}'), ["under data, rows"]),
    (*json_file('{"3": {"q": "x"}, "7": {"q": "y"}}'), ["holds columns", "orient"]),
    (*json_file('{"data": [{"q": 1}, 3]}'), ["item 2 of 'data'", "is a number"]),
    (*json_file('{"data": [{"q": 1},\n {"q" 2}]}'), ["line 2 of", "is not JSON"]),
    ("d.csv", b"q,a\n1,2\n1,2,3,4\n", ["line 3 of", "has 4 cells", "its header has 2"]),
    ("d.csv", b'q,a\n1,"2\n', ["line 2 of", "is not CSV"]),
    ("d.csv", b'q,a\n1,"2"3\n', ["line 2 of", "is not CSV", "written twice"]),
    ("d.csv", b'"a"b,c\n1,2\n', ["line 1 of", "is not CSV"]),
    ("d.json", b'{"a": ' + b"[" * 100_000, ["nested too deeply"]),
    ("d.parquet", b"PAR1 no more", ["is not a readable parquet file", "Write it again"]),
    ("d.parquet", b"", ["parquet"]),
    ("d.arrow", b"ARROW1", ["arrow"]),
    ("d.jsonl.gz", b"no gzip", ["cannot be read"]),
    ("d.jsonl.gz", gzip.compress(b'{"q": 1}\n' * 99, mtime=0)[:-9], ["cannot be read"]),
    ("d.jsonl.zst", packed(b'{"q": 1}\n' * 999, ".zst")[:-5], ["cannot be read"]),
]


# What files hold is no good name of a test: it may differ from process to process.
@pytest.mark.parametrize(
    ("name", "raw", "words"), REFUSED, ids=[f"{case[0]}-{n}" for n, case in enumerate(REFUSED)]
)
def test_files_that_are_refused(tmp_path: Path, name: str, raw: bytes, words: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(FedForwardError) as caught:
        read(path)
    for word in [f"data.source = {str(path)!r}", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("[]", []),
        (" [ ] \n", []),
        ('\ufeff[{"q": 1}]', [{"q": "1"}]),
        ('{"data": [{"q": 1}], "version": 2}', [{"q": "1"}]),
        ('{"prompts": [{"q": 1}]}', [{"q": "1"}]),
        ('{"data": [], "meta": [{"q": 1}]}', []),
        ('{"q": "whole", "refs": [{"q": "part"}]}\n', [["whole"]]),
        ('{"q": "one", "tags": ["x"]}\n{"q": "two", "tags": []}\n', [["one"], ["two"]]),
        ('{"q": 1}\n', [{"q": "1"}]),
        ('{"q": 1,\n "a": 2}\n', [{"q": "1", "a": "2"}]),
        ("", []),
        (" \n", []),
    ],
)
def test_json_files_of_several_shapes(tmp_path: Path, text: str, rows: list[Any]) -> None:
    path = tmp_path / "d.json"
    path.write_text(text, encoding="utf-8")
    found = read(path)
    assert [
        [row["q"]] if isinstance(want, list) else row for row, want in zip(found, rows, strict=True)
    ] == rows


def test_arrays_longer_than_a_chunk_are_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"q": "x" * (n % 70), "n": n, "d": {"e": [n] * (n % 5)}} for n in range(300)]
    wanted = [json.loads(json.dumps(row), parse_int=str) for row in rows]
    monkeypatch.setattr(readers, "_CHUNK", 64)
    for indent in (None, 1):
        path = tmp_path / f"{indent}.json"
        path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
        assert read(path) == wanted
    lines = path.read_text(encoding="utf-8").split("\n")
    place = next(n for n, line in enumerate(lines, 1) if '"n": 250' in line)
    lines[place - 1] = ' "n" 250,'
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(FedForwardError, match=rf"line {place} of .* is not JSON"):
        read(path)


def test_a_late_change_of_type_is_no_matter(tmp_path: Path) -> None:
    rows = [{"q": str(n), "meta": None} for n in range(3000)]
    rows += [{"q": "x", "meta": "text"}, {"q": "y", "meta": [1]}, {"q": "z"}]  # type: ignore[list-item]
    assert [row["q"] for row in read(write_rows(tmp_path / "d.jsonl", rows))][-3:] == list("xyz")


Folder = Callable[[Path], None]


def test_folders_and_patterns_are_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "shards [1]"
    folder.mkdir()
    for n in (2, 0, 1):
        write_rows(folder / f"part-{n}.jsonl", [{"q": f"{n}"}])
    (folder / "README.md").write_text("about", encoding="utf-8")
    (folder / ".part-9.jsonl").write_text("hidden", encoding="utf-8")
    assert [row["q"] for row in read(folder)] == ["0", "1", "2"]
    plain = folder.rename(tmp_path / "shards")
    assert [row["q"] for row in read(f"{plain}/part-[12].jsonl")] == ["1", "2"]
    assert [row["q"] for row in read(f"{tmp_path}/**/part-*.jsonl")] == ["0", "1", "2"]
    source = find(str(plain), key="data.source")
    assert source.count() == 3 and source.where(1, 4) == f"line 4 of {plain / 'part-1.jsonl'}"


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert read(tmp_path / "saved") == ROWS
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(
        str(tmp_path / "splits")
    )
    with pytest.raises(FedForwardError, match=r"holds the splits train. Name the folder of one"):
        read(tmp_path / "splits")
    assert read(tmp_path / "splits" / "train") == ROWS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.jsonl", "no such file"),
        ("gone.parquet", "no such file"),
        ("./gone", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("*.jsonl", "no file has a name like that"),
        ("empty", "is a folder without data (no files)"),
        ("words", "is a folder without data (notes.txt)"),
        ("mixed", "files of several forms, such as a.csv and b.jsonl"),
        ("mixed/*", "files of several forms"),
        ("words/*", "takes in 'notes.txt', whose ending is not known"),
        ("words/notes.txt", "the ending '.txt' is not known"),
        ("d.parquet.gz", "the ending '.gz' is not known"),
        ("x\0y.jsonl", "no such file"),
    ],
)
def test_names_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "words", "mixed"):
        (tmp_path / folder).mkdir()
    for file in ("words/notes.txt", "mixed/a.csv", "mixed/b.jsonl", "d.parquet.gz"):
        (tmp_path / file).write_text("x", encoding="utf-8")
    with pytest.raises(FedForwardError) as caught:
        read(name)
    assert words in str(caught.value) and f"data.source = {name!r}" in str(caught.value)


def test_rows_that_the_hub_library_keeps_are_their_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of files are not kept in its cache at all."""
    import datasets

    table = datasets.Dataset.from_list([{"q": "x"}])
    cache = tmp_path / "cache"

    def load(*_: Any, **__: Any) -> datasets.Dataset:
        cache.mkdir()
        (cache / "rows.arrow").write_bytes(b"x")
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    before = os.umask(0o022)
    try:
        find("owner/name", key="data.source")
        assert stat.S_IMODE((cache / "rows.arrow").stat().st_mode) == 0o600
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_a_hub_data_set_is_read_like_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"q": "x", "a": 0.1}, {"q": "y", "a": 2.0}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    source = find("owner/name", key="data.source")
    assert source.columns() == ["q", "a"] and source.count() == 2
    assert [row for _, _, row in source.read(["a"])] == [{"a": 0.1}, {"a": 2.0}]
    assert source.where(0, 2) == "row 2 of owner/name"
