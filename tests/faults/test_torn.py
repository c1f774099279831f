"""Files are cut at a random place: a run goes on to the same bits, or says which file it is."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedforward.config.loading import validate
from fedforward.core.errors import FedForwardError
from fedforward.training.run import Run
from fedforward.training.run_directory import RunDirectory
from tests.faults.federation import simulated
from tests.support.coordinator import KilledError, World

pytestmark = [
    pytest.mark.usefixtures("imported_libraries"),
    pytest.mark.timeout(3600),
]
DIGESTS = ("rounds", "state_digest", "ledger_digest")


def torn(path: Path, chance: random.Random) -> None:
    """Cut a file short, or leave zeros where a system that went down has written nothing."""
    data = path.read_bytes()
    place = chance.randrange(len(data)) if data else 0
    lost = bytes(len(data) - place) if chance.randrange(3) == 0 else b""
    path.write_bytes(data[:place] + lost)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: Any) -> tuple[dict[str, Any], list[Any], Path]:
    """A simulated run that was broken off, its configuration, and the digests of a whole one."""
    folder = tmp_path_factory.mktemp("torn")
    content = simulated(folder)
    content["federation"]["rounds"] = 6
    whole = Run(validate(content), folder / "whole").fit().to_json()
    with pytest.MonkeyPatch.context() as patch:
        append = RunDirectory.append_metrics

        def killed(self: RunDirectory, line: Any) -> None:
            append(self, line)
            if line["round"] == 3:
                raise KeyboardInterrupt

        patch.setattr(RunDirectory, "append_metrics", killed)
        run = Run(validate(content), folder / "half")
        with pytest.raises(KeyboardInterrupt):
            run.fit()
        run.ledger.close()
    return content, [whole[key] for key in DIGESTS], folder / "half"


def test_a_simulation_with_a_torn_file(
    tmp_path: Path, broken_off: Any, kills: int, seed: int
) -> None:
    content, wanted, half = broken_off
    chance, refused = random.Random(seed), 0
    names = [path.relative_to(half) for path in files(half)]
    for number in range(max(kills, 4)):
        out = Path(shutil.copytree(half, tmp_path / f"run{number}"))
        # The ledger, and then any.
        name = names[number] if number < len(names) else chance.choice(names)
        torn(out / name, chance)
        try:
            summary = Run(validate(content), out, resume=True).fit().to_json()
        except FedForwardError as error:
            refused += 1
            words = str(error)
            assert name.name in words or str(out) in words, (name, words)
            (out / name).write_bytes((half / name).read_bytes())
            for beside in (out / name).parent.glob(f"{name.name}-*"):
                beside.unlink()
            summary = Run(validate(content), out, resume=True).fit().to_json()
        assert [summary[key] for key in DIGESTS] == wanted, name
        shutil.rmtree(out)


def test_a_federation_with_a_torn_file(world: Any, tmp_path: Path, kills: int, seed: int) -> None:
    """Of the server, or of a site that is started again."""
    found: World = world()
    whole = found.run()
    # Another, whose coordinator is killed in its third round.
    half: World = world()

    def look() -> None:
        if half.round == 3:
            raise KilledError

    half.clock.look = look
    half.killed()
    copy = tmp_path / "copy"
    shutil.copytree(half.path, copy)
    names = [
        path.relative_to(copy)
        for path in files(copy)
        if path.suffix not in (".log", ".jsonl") or path.name == "metrics.jsonl"
    ]
    chance = random.Random(seed)
    for number in range(max(kills, 4)):
        name = names[number] if number < len(names) else chance.choice(names)
        again(half, copy)
        torn(half.path / name, chance)
        try:
            summary = half.run(resume=(half.out / "config.toml").is_file())
            noted = notes(half) - {""}
            assert not noted, (name, noted)
        except (FedForwardError, AssertionError) as error:
            # A site that refuses is waited for; the server says why it waits.
            words = str(error) + str(notes(half))
            assert (
                name.name in words
                or str(half.out) in words
                or "refus" in words.lower()
                or ("cannot be carried out at this site" in words)
            ), (name, words)
            again(half, copy)
            summary = half.run(resume=True)
        assert summary["rounds"] == whole["rounds"], name
        assert summary["state_digest"] == whole["state_digest"], name


def notes(half: World) -> set[str]:
    """What is wrong with sites; nothing where the server ended before it saw any."""
    return {str(site["note"]) for site in half.status.get("sites", [])}


def again(half: World, copy: Path) -> None:
    """All files as they were when the coordinator was killed, and all sites started again."""
    shutil.rmtree(half.path)
    shutil.copytree(copy, half.path)
    half.clock.now = 1000.0
    half.restart("a", "b", "c")
