"""Bad input through the command line: exit code 2, one message, no traceback, nothing lost."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedforward.federation.ledger import Ledger
from tests.support.command_line import MODEL, command, limited, write_config, write_rows


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with c.toml and a finished run of it; tests copy `run` before they change it."""
    folder = tmp_path_factory.mktemp("finished")
    result = command("run", write_config(folder), "--out", folder / "run", "--json")
    assert result.code == 0, result
    assert json.loads(result.out)["rounds"] == 2
    return folder


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished / "run", tmp_path / "damaged"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_version() -> None:
    result = command("--version")
    assert result.code == 0 and result.out.startswith("fedforward 0.")


def test_init_then_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("init").code == 0
    command("init").refused("fedforward.toml exists already")
    command("init", "none/x.toml").refused("none/x.toml cannot be written", "No such file")
    data = write_rows(tmp_path / "r.jsonl")
    small = ["federation.rounds=1", "method.local_steps=1", "data.sequence_length=32"]
    small += ["data.prompt={q}", "data.answer={a}", "lora.rank=1", "run.threads=1"]
    result = command(
        "run",
        "fedforward.toml",
        f"model.path={MODEL}",
        f"data.source={data}",
        *small,
        "run.device=cpu",
    )
    assert result.code == 0, result
    assert "everything is in runs/fedforward: see summary.json, loss.png and adapter" in result.out
    assert (tmp_path / "runs/fedforward/adapter/adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.learning_rat=1", ["method.learning_rat", "Did you mean method.learning_rate?"]),
        ("method.name=fedmezzo", ["method.name = 'fedmezzo'", "'fedavg'"]),
        ("rounds=3", ["'rounds=3'", "section.key=value"]),
        ("data.source=gone.jsonl", ["data.source = 'gone.jsonl'", "no such file"]),
        ("data.source=/dev", ["data.source = '/dev' is a folder without data"]),
        ("federation.clients=9", ["federation.clients = 9", "only 8 training examples"]),
        ("data.prompt={question}", ["data.prompt", "{question}", "q, a, site"]),
        ("data.prompt={q:d}", ["data.prompt = '{q:d}'", "only a name"]),
        ("data.sequence_length=257", ["data.sequence_length = 257", "256 positions"]),
        (
            "data.sequence_length=1",
            ["leaves no room for an answer", "Raise data.sequence_length = 1"],
        ),
        ("data.heldout=12", ["data.heldout = 12 keeps 12", "only 12"]),
        ("data.heldout=1.5", ["data.heldout = 1.5", "whole number"]),
        ('lora.targets=["nothing"]', ["lora.targets = ['nothing']", "q_proj"]),
        ("lora.targets=[", ["lora.targets = '['", "q_proj"]),
        ('lora.targets=["embed_tokens"]', ["lora.targets = ['embed_tokens']", "q_proj"]),
        ("model.path=/gone/model", ["model.path = '/gone/model'", "no such folder"]),
        ("run.device=gpu", ["run.device = 'gpu'", "'cpu'"]),
        ("run.device=cpu:x", ["run.device = 'cpu:x'", "'cpu'"]),
        ("run.device=cuda:99", ["run.device = 'cuda:99'", "CUDA device"]),
        ("federation.field=zz", ["federation.field = 'zz'", "q, a, site"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_mistake_leaves_no_run_behind(config: Path, override: str, words: list[str]) -> None:
    out = config.parent / "out"
    more = ["federation.partition=by-field"] if "field" in override else []
    command("run", config, override, *more, "--out", out).refused(*words)
    assert not out.exists() or not any(out.iterdir())


def test_after_a_mistake_the_same_out_can_be_used(config: Path) -> None:
    out = config.parent / "out"
    command("run", config, "data.source=gone.jsonl", "--out", out).refused()
    assert command("run", config, "--out", out).code == 0


@pytest.mark.parametrize("raw", [b"", b" \n \n", b'{"q": "1", "a": "2"}\n{"q": "1", "a"\n'])
def test_data_that_cannot_be_read(config: Path, raw: bytes) -> None:
    data = config.parent / "bad.jsonl"
    data.write_bytes(raw)
    words = ["line 2"] if raw.strip() else ["the file holds no examples"]
    command("run", config, f"data.source={data}").refused(str(data), *words)


def test_configurations_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_bytes(bytes(range(256)))
    command("run", tmp_path / "b.toml").refused("b.toml is not valid TOML")
    command("run", tmp_path).refused(f"{tmp_path} is a folder", "one of its files: b.toml")
    command("run", tmp_path / "no.toml").refused("no.toml: no such configuration file")
    (tmp_path / "e.toml").write_text("", encoding="utf-8")
    command("run", tmp_path / "e.toml").refused("[model] is missing", "[data] is missing")


@pytest.mark.parametrize("option", ["--method.mu", "--method.mu=3", "--set", "--key"])
def test_keys_of_a_configuration_are_no_options(config: Path, option: str) -> None:
    result = command("run", config, option, "method.mu=3")
    assert result.code == 2
    words = "method.mu" if "." in option else "section.key"
    assert f"Write {words}=VALUE, without dashes." in " ".join(result.error.split())


@pytest.mark.parametrize("name", ["x.abc", "x", "", ".png", "none/x.png"])
def test_a_picture_that_cannot_be_written(config: Path, name: str) -> None:
    words = "no folder" if name.startswith("none") else "ends in .png, .pdf or .svg"
    command("plan", config, "--png", config.parent / name).refused("--png", words)


def test_a_file_of_a_run_is_not_the_run(finished: Path) -> None:
    for name in ("config.toml", "adapter"):
        command("verify", finished / "run" / name).refused(f"folder of a run, {finished / 'run'}.")


def _spoil(file: str, change: Callable[[bytes], bytes] | None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / file
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))

    return spoil


def _with(raw: bytes, **changes: object) -> bytes:
    return json.dumps(json.loads(raw) | changes).encode()


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_spoil("config.json", None), "no config.json"),
        (_spoil("config.json", lambda raw: raw[:20]), "config.json is damaged"),
        (_spoil("config.json", lambda raw: b"[]"), "config.json is damaged"),
        (_spoil("config.json", lambda raw: _with(raw, hidden_size=96)), "other shapes"),
        (_spoil("config.json", lambda raw: _with(raw, num_hidden_layers=9)), "the weights lack"),
        (_spoil("model.safetensors", None), "no weights"),
        (_spoil("model.safetensors", lambda raw: raw[: len(raw) // 2]), "cut short"),
        (_spoil("model.safetensors", lambda raw: b"\xff" * 100), "cut short"),
        (_spoil("tokenizer.json", None), "cannot be loaded"),
        (_spoil("tokenizer.json", lambda raw: raw[:100]), "tokenizer.json is damaged"),
    ],
)
def test_models_that_cannot_be_used(
    config: Path, model: Path, spoil: Callable[[Path], None], word: str
) -> None:
    spoil(model)
    command("run", config, f"model.path={model}").refused(f"model.path = '{model}'", word)


def test_a_model_whose_weights_are_not_numbers(config: Path, model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    next(w for name, w in weights.items() if "down_proj" in name)[0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = command("run", config, f"model.path={model}", "--out", config.parent / "out")
    result.refused("the base model itself is not a number", str(model))


def test_divergence_stops_with_advice_and_leaves_results(config: Path) -> None:
    out = config.parent / "out"
    result = command(
        "run", config, "method.learning_rate=1e30", "federation.rounds=5", "--out", out
    )
    result.refused("diverged", "after round 1", "Lower method.learning_rate", "1e+30", str(out))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["rounds"] == 1 and summary["stopped"].startswith("diverged")
    assert (out / "adapter").is_dir() and (out / "loss.png").is_file()
    assert command("verify", out).code == 0


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_an_infinite_update_never_reaches_the_ledger(config: Path) -> None:
    out = config.parent / "out"
    result = command("run", config, "method.learning_rate=1e300", "--out", out)
    result.refused("method.learning_rate", "not finite")
    assert Ledger(out / "ledger.sqlite").length == 0


def test_a_run_directory_is_not_overwritten(finished: Path, tmp_path: Path) -> None:
    out, config = finished / "run", finished / "c.toml"
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    command("run", config, "--out", out).refused("holds a run already", "--resume")
    other = command("run", config, "method.mu=0.5", "--out", out, "--resume")
    other.refused("another configuration", "method.mu is 0.001 there and 0.5 here")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_folders_that_cannot_hold_a_run(config: Path) -> None:
    folder = config.parent
    command("run", config, "--out", folder).refused(str(folder), "not empty and is not a run")
    command("run", config, "--out", config / "x").refused(f"{config / 'x'}", "Not a directory")
    command("run", config, "--out", config).refused(str(config), "Choose another --out")
    command("run", config, "--out", "/proc/none/x").refused("/proc/none/x", "Choose another --out")
    command("demo", "--out", config / "x").refused("Not a directory")


def test_what_is_not_a_run(tmp_path: Path, finished: Path) -> None:
    for path in (tmp_path, tmp_path / "gone", finished / "c.toml"):
        command("verify", path).refused(str(path), "not a run directory", "no config.toml")
        command("export", path, "--out", tmp_path / "x").refused("not a run directory")
    assert not (tmp_path / "x").exists()
    command("export", finished / "run", "--out", finished).refused("not an empty folder")
    under = finished / "c.toml" / "x"
    command("export", finished / "run", "--out", under).refused(str(under), "Not a directory")


def test_verify_and_export(finished: Path, tmp_path: Path) -> None:
    result = command("verify", finished / "run")
    assert result.code == 0 and "bit-identical: 2 rounds" in result.out
    out = tmp_path / "[bold]out"
    assert f"wrote {out}" in command("export", finished / "run", "--out", out).out
    saved = (finished / "run/adapter/adapter_model.safetensors").read_bytes()
    assert (out / "adapter_model.safetensors").read_bytes() == saved


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"round": 1}'])
@pytest.mark.parametrize("name", ["plan.json", "config.toml"])
def test_damaged_settings_are_named(finished: Path, damaged: Path, name: str, raw: bytes) -> None:
    (damaged / name).write_bytes(raw)
    command("verify", damaged).refused(str(damaged / name))
    command("run", finished / "c.toml", "--out", damaged, "--resume").refused(str(damaged / name))
    assert (damaged / name).read_bytes() == raw


@pytest.mark.parametrize("change", [{"threads": -1}, {"evaluation_rows": "8"}, {"trajectory": "x"}])
def test_a_plan_with_senseless_values_is_damaged(damaged: Path, change: dict[str, object]) -> None:
    plan = damaged / "plan.json"
    plan.write_bytes(_with(plan.read_bytes(), **change))
    command("verify", damaged).refused(str(plan), "damaged", "Restore it from a copy")


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff\xfe", b'{"rounds": 2}'])
def test_a_damaged_summary_is_a_difference_and_can_be_made_again(
    finished: Path, damaged: Path, raw: bytes
) -> None:
    (damaged / "summary.json").write_bytes(raw)
    command("verify", damaged).refused("summary.json is damaged", "--resume")
    assert command("run", finished / "c.toml", "--out", damaged, "--resume").code == 0
    assert command("verify", damaged).code == 0


@pytest.mark.parametrize(
    ("kept", "raw"), [(0, b""), (2, b"{"), (1, b"[]\n"), (2, b"\xff\xfe\n"), (2, b'{"round": 2}\n')]
)
def test_damaged_metrics_are_written_again(
    finished: Path, damaged: Path, kept: int, raw: bytes
) -> None:
    metrics = damaged / "metrics.jsonl"
    whole = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(whole[:kept]) + raw)
    assert command("run", finished / "c.toml", "--out", damaged, "--resume").code == 0
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert lines[2]["training_loss"] == json.loads(whole[2])["training_loss"]


def _flips(raw: bytes) -> Iterator[bytes]:
    """The ledger with one byte wrong: in its magic, its schema page, and a round's last byte."""
    for place in (5, 100, len(raw) - 40):
        wrong = bytearray(raw)
        wrong[place] ^= 0xFF
        yield bytes(wrong)


def test_a_damaged_ledger_is_refused_and_left_alone(finished: Path, damaged: Path) -> None:
    ledger = damaged / "ledger.sqlite"
    whole = ledger.read_bytes()
    for raw in (*_flips(whole), whole[:5000], b"", b"not a database" * 50):
        ledger.write_bytes(raw)
        command("verify", damaged).refused(str(ledger), "from a copy")
        assert ledger.read_bytes() == raw or not raw
    for arguments in (
        ("export", damaged, "--out", damaged / "x"),
        ("run", finished / "c.toml", "--out", damaged, "--resume"),
    ):
        for raw in (b"", whole[:5000]):
            ledger.write_bytes(raw)
            command(*arguments).refused(str(ledger), "from a copy")
    ledger.write_bytes(whole)
    assert command("verify", damaged).code == 0


def test_a_damaged_adapter_is_a_difference(damaged: Path) -> None:
    saved = damaged / "adapter" / "adapter_model.safetensors"
    whole = saved.read_bytes()
    saved.write_bytes(whole[:50])
    command("verify", damaged).refused("adapter/adapter_model.safetensors cannot be read")
    saved.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    command("verify", damaged).refused("does not verify", "1 values of")


def test_a_full_disk_at_the_start(config: Path) -> None:
    """Too little room for the first files: nothing is claimed, and a new run may begin."""
    out = config.parent / "out"
    result = limited(400, "run", config, "--out", out)
    result.refused(str(out), "make room")
    assert [file.name for file in out.iterdir() if file.name == "config.toml"] == []
    assert command("run", config, "--out", out).code == 0


def test_a_full_disk_for_the_data(config: Path) -> None:
    """Rows beyond the first megabyte lie in temporary files."""
    rows = config.parent / "rows.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8") * 3000, encoding="utf-8")
    result = limited(100_000, "run", config, "--out", config.parent / "out")
    result.refused("folder for temporary files", "Make room", "TMPDIR")


def test_a_full_disk_in_the_middle(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database fills up after some rounds; these stay, and the run ends as if unhindered."""
    many = ["federation.rounds=60", "method.local_steps=2", "run.evaluate_every=60"]
    whole, out = config.parent / "whole", config.parent / "out"
    assert command("run", config, *many, "--out", whole).code == 0
    real = sqlite3.connect

    def tight(*arguments: object, **options: object) -> sqlite3.Connection:
        database = real(*arguments, **options)  # type: ignore[call-overload]
        database.execute("PRAGMA max_page_count = 4")
        return database

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", tight)
        result = command("run", config, *many, "--out", out)
    result.refused("full", "Every finished round is kept", "--resume")
    kept = Ledger(out / "ledger.sqlite").length
    assert 0 < kept < 60
    assert command("run", config, *many, "--out", out, "--resume").code == 0
    ends = [json.loads((folder / "summary.json").read_text("utf-8")) for folder in (whole, out)]
    assert ends[0]["ledger_digest"] == ends[1]["ledger_digest"]
    assert ends[0]["state_digest"] == ends[1]["state_digest"]
