"""The documents say what is so: blocks are valid, keys and links exist, generated pages whole."""

import ast
import importlib
import importlib.util
import re
import runpy
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, Field, create_model

import fedforward
from fedforward.cli import main
from fedforward.config.loading import OLD_KEYS, OLD_VALUES, validate_as
from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig
from fedforward.core.errors import FedForwardError
from fedforward.core.identity import ModelIdentity
from fedforward.core.logs import PHASES
from fedforward.core.registry import (
    AGGREGATORS,
    CALLBACKS,
    ESTIMATORS,
    METHODS,
    OBJECTIVES,
    REPORT_FILTERS,
    RUNTIMES,
)
from fedforward.core.steps import Evaluation
from fedforward.deployment.site_metrics import SiteMetrics
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.envelope import Enrollment, MessageKind
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from fedforward.methods.parameters import Parameter, parameters_of
from fedforward.training.replay import verify

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
sys.path.insert(0, str(ROOT / "scripts/docs"))

pages = importlib.import_module("pages")
reference = importlib.import_module("configuration")
check_prose = runpy.run_path(str(ROOT / "scripts/check_prose.py"))

#: What follows `fedforward.` in the groups of entry points, which are no modules but methods.
ENTRY_POINTS = {
    registry.group.partition(".")[2]
    for registry in (
        METHODS,
        ESTIMATORS,
        OBJECTIVES,
        AGGREGATORS,
        REPORT_FILTERS,
        RUNTIMES,
        CALLBACKS,
    )
}
LOGGERS = {PHASES.name}
#: Endings of files that look like keys of a section: `run.toml`, `federation.py`.
FILE_ENDINGS = ("toml", "crt", "key", "py", "json")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        yield found[1]


def sections(kind: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {name: section for name, _, section in reference.sections(kind)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_toml_blocks_are_valid(path: Path) -> None:
    for block in blocks(path, "toml"):
        content = tomllib.loads(block)
        if "project" in content:
            continue
        kind = SiteConfig if {"site", "limits"} & set(content) else Config
        validate_as(kind, content, name_of(path))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_compile_and_import_what_exists(path: Path) -> None:
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


def defined_in(page: str, name: str) -> Any:
    """The class of that name that a page's Python block defines."""
    for block in blocks(ROOT / "docs/how-to" / page, "python"):
        if f"class {name}(" in block:
            # Dataclasses look their module up.
            module = sys.modules[f"document_{name}"] = ModuleType(f"document_{name}")
            exec(block, module.__dict__)
            return getattr(module, name)
    raise LookupError(f"{page} defines no {name}")


def test_the_method_of_the_page_runs_and_replays(
    configure: Callable[..., Any], carry_out: Callable[..., Any], tmp_path: Path
) -> None:
    trimmed = defined_in("own-method.md", "TrimmedMean")
    gradients = np.array([[1.0], [2.0], [90.0]], np.float32)
    results = [
        ClientResult(1 / 3, 0.5, Report(0, c, 1, 1.0, 0, g)) for c, g in enumerate(gradients)
    ]
    entry = trimmed(local_steps=1).aggregate(0, results, None)
    assert entry.contributions[0].coefficients.tolist() == [-1.0]
    METHODS.register("trimmed-mean")(trimmed)
    try:
        config = configure(
            federation__clients=3, method__name="trimmed-mean", method__parameters={"trim": 1}
        )
        carry_out(config, tmp_path / "run")
        found = verify(tmp_path / "run")
        assert found.differences == [] and found.replayed and found.saved
    finally:
        METHODS.forget("trimmed-mean")


def test_the_objective_of_the_page_runs_and_is_capped(
    configure: Callable[..., Any], carry_out: Callable[..., Any], tmp_path: Path
) -> None:
    capped = defined_in("own-objective.md", "CappedLoss")
    losses = Evaluation(np.array([20.0, 3.0]), np.array([2, 3]))
    model = SimpleNamespace(token_losses=lambda probes: [losses])
    assert capped().measure(model, [])[0].sums.tolist() == [8.0, 3.0]
    OBJECTIVES.register("capped")(capped)
    try:
        config = configure(method__objective="capped")
        summary = carry_out(config, tmp_path / "run")
    finally:
        OBJECTIVES.forget("capped")
    assert summary["metrics"]["capped"]["start"] < 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_use_names_of_the_public_face(path: Path) -> None:
    for block in blocks(path, "python"):
        for name in re.findall(r"\bff\.(\w+)", block):
            assert hasattr(fedforward, name), f"ff.{name}"


def keys_named(text: str) -> Iterator[tuple[str, str, str | None]]:
    """(section, key, value as written or None) of each `section.key` in the text."""
    names = set(sections(Config)) | set(sections(SiteConfig))
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for section, key, _, value in re.findall(r"`([a-z]+)\.(\w+)( = ([^`]+))?`", prose):
        if section in names and key not in FILE_ENDINGS:
            yield section, key, value or None


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_keys_and_values_in_the_text_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "CHANGELOG.md":
        # What has another name now is tested below.
        text = re.sub(r"^(\| )`[^|]*`( \| `)", r"\1\2", text, flags=re.MULTILINE)
    for section, key, written in keys_named(text):
        kinds = [sections(kind).get(section) for kind in (Config, SiteConfig)]
        found: list[Any] = [
            kind.model_fields[key] for kind in kinds if kind and key in kind.model_fields
        ]
        if section == "method":
            found += [own for name in METHODS for own in _settings(name) if own.name == key]
        assert found, f"{section}.{key}"
        if written is not None:
            value = tomllib.loads(f"value = {written}")["value"]
            assert any(_takes(field, value) for field in found), f"{section}.{key} = {written}"


def test_the_changelog_has_every_old_key_and_value() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for old, new in OLD_KEYS.items():
        assert f"| `{old}` | `{old.partition('.')[0]}.{new}` |" in text
    for key, values in OLD_VALUES.items():
        for old, new in values.items():
            assert f'| `{key} = "{old}"` | `{key} = "{new}"` |' in text


def _settings(method: str) -> list[Parameter]:
    return list(parameters_of(METHODS.get(method)).values())


def _takes(field: Any, value: Any) -> bool:
    if isinstance(field, Parameter):
        try:
            field.check(value, field.name)
        except FedForwardError:
            return False
        return True
    one = create_model("One", value=(field.annotation, Field(...)))
    try:
        one.model_validate({"value": value})
    except ValueError:
        return False
    return True


def test_a_wrong_key_or_value_in_the_text_is_found() -> None:
    found = list(keys_named("`model.path`, `run.toml`, `method.mu = 1e-3`\n```\n`run.x`\n```\n"))
    assert found == [("model", "path", None), ("method", "mu", "1e-3")]
    field = sections(Config)["model"].model_fields["dtype"]
    assert _takes(field, "bfloat16") and not _takes(field, "int8")
    (candidates,) = _settings("fedkseed")
    assert _takes(candidates, 4096) and not _takes(candidates, 0)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_to_files_lead_somewhere(path: Path) -> None:
    made = {ROOT / "docs" / name for name in pages.generated(ROOT)}
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            file = (path.parent / target).resolve()
            assert file.exists() or file in made, f"{name_of(path)}: {target}"


def made_up_names(text: str) -> Iterator[str]:
    """Files, modules, commands and targets of `make` that a text names and the tree has not."""
    roots = (ROOT, ROOT / "src/fedforward", ROOT / "examples/federation")
    for file in re.findall(r"`(?:python )?([\w-]+(?:/[\w-]+)*/[\w-]+\.py)\b", text):
        if not any((root / file).is_file() for root in roots):
            yield file
    for name in re.findall(r"`(fedforward(?:\.\w+)+)`", text):
        if name.split(".")[1] not in ENTRY_POINTS and not _leads_somewhere(name):
            yield name
    commands = {name for group in main.GROUPS.values() for name in group}
    for command in re.findall(r"(?:^    |`)fedforward ([a-z][\w-]*)", text, re.MULTILINE):
        if command not in commands | set(main.RENAMED):
            yield f"fedforward {command}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^    |`|run: )make ([\w-]+)", text, re.MULTILINE):
        if target not in targets:
            yield f"make {target}"


def _leads_somewhere(name: str) -> bool:
    """Whether a dotted name is a module, a logger of the package or an attribute of a module."""
    if name in LOGGERS:
        return True
    module, _, attribute = name.rpartition(".")
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    if hasattr(home, attribute):
        return True
    return hasattr(home, "__path__") and importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / ".github/workflows/ci.yml"], ids=name_of)
def test_files_modules_and_commands_in_the_text_exist(path: Path) -> None:
    assert not list(made_up_names(path.read_text(encoding="utf-8")))


def test_a_made_up_name_in_the_text_is_found() -> None:
    wrong = (
        "`benchmarks/none.py` `fedforward.core.none` `fedforward dance`\n"
        "    fedforward sing run.toml\n      - run: make hay\n"
    )
    assert len(list(made_up_names(wrong))) == 5
    right = "`training/loop.py` `fedforward.core.steps` `fedforward run`\n    make docs\n"
    assert not list(made_up_names(right))


def test_the_generated_pages_are_whole() -> None:
    made = pages.generated(ROOT)
    keys = made["reference/configuration.md"]
    for kind in (Config, SiteConfig):
        for name, section in sections(kind).items():
            assert f"### `[{name}]`" in keys
            assert all(f"| `{key}` |" in keys for key in section.model_fields)
    for name in METHODS:
        for own in _settings(name):
            assert f"| `{own.name}` | `{name}` |" in keys
    for command in ("run", "plan", "server", "client", "verify"):
        assert f"## `fedforward {command}`" in made["reference/commands.md"]
    for name in fedforward.__all__:
        assert f'heading: "{name}"' in made["reference/api.md"]
    wire = made["reference/wire.md"]
    for kind in (Task, Report, Entry, Contribution, Snapshot, ClientResult):
        for row in kind.describe():
            assert f"| {row.name} | {row.type} | {row.meaning} |" in wire
    assert all(f"`{kind.name}`" in wire for kind in MessageKind)
    errors = made["reference/errors.md"]
    assert "is not valid TOML" in errors and "was refused" in errors
    assert "class DeComFL" in made["how-to/method-example.md"]


def test_the_page_on_privacy_has_every_field_method_and_filter() -> None:
    text = (ROOT / "docs/privacy.md").read_text(encoding="utf-8")
    sent = [row.name for kind in (Report, Snapshot) for row in kind.describe()]
    sent += [field.name for field in fields(Enrollment) if field.name != "model"]
    sent += [field.name for field in fields(ModelIdentity)]
    sent += [field.name for field in fields(SiteMetrics) if field.name != "loss"]
    for name in (*sent, "heldout_loss", *METHODS):
        assert f"`{name}`" in text, name
    for name in REPORT_FILTERS:
        assert re.search(rf"^\| `{name}(:LIMIT)?` \|", text, re.MULTILINE), name


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert listed == there | set(pages.generated(ROOT))


def test_sentences_and_lines_are_short() -> None:
    complaints = check_prose["complaints"]
    for path in DOCUMENTS:
        assert not list(complaints(path.read_text(encoding="utf-8"))), name_of(path)
    long = " ".join(["word"] * 26) + ".\n"
    assert [number for number, _ in complaints(f"# Title\n\nShort.\n{long}")] == [3, 4]
    assert not list(complaints(f"```\n{long}```\n\n| {long.strip()} |\n"))


def test_the_picture_of_a_round_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(ROOT / "scripts/draw_round.py"))["picture"]()
    assert (ROOT / "docs/round.svg").read_text(encoding="utf-8") == drawn
