"""The wheel has all that an installation needs, and works from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedforward import __version__

pytest.importorskip("build", reason="in the dev extra")
pytest.importorskip("hatchling", reason="in the dev extra")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree."""
    out = tmp_path_factory.mktemp("dist")
    line = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), "."]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    assert path.name == f"fedforward-{__version__}-py3-none-any.whl"
    return path


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    source = ROOT / "src"
    wanted = {
        file.relative_to(source).as_posix(): file.read_bytes()
        for file in (source / "fedforward").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    for name in ("py.typed", "directions/half_normal.bin", "demo/model/model.safetensors"):
        assert f"fedforward/{name}" in wanted
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    about = f"fedforward-{__version__}.dist-info/"
    assert {name for name in found if not name.startswith(about)} == wanted.keys()
    assert all(found[name] == content for name, content in wanted.items())
    assert f"Version: {__version__}\n" in found[f"{about}METADATA"].decode()
    assert "fedforward = fedforward.cli.main:main" in found[f"{about}entry_points.txt"].decode()
    assert found[f"{about}licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


# The kernels compile anew in a new place, which takes a minute.
@pytest.mark.slow
def test_what_the_wheel_holds_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import fedforward\n"
        "from fedforward.demo import run as demonstration\n"
        "from fedforward.training.loop import Session\n"
        "class Silent:\n"
        "    def phase(self, text): pass\n"
        "    def progress(self, done, total, line): pass\n"
        "config = demonstration.prepare(Path('data.jsonl'), rounds=1)\n"
        "assert config.model.path.startswith(sys.argv[1]), config.model.path\n"
        "print(Session(config, Path('out'), False, Silent()).run()['rounds'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def python(*arguments: str) -> str:
        line = [sys.executable, *arguments]
        done = subprocess.run(
            line, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert python("-m", "fedforward.cli", "--version") == f"fedforward {__version__}\n"
    assert python("-c", code, str(installed)) == "1\n"
    assert "bit-identical: 1 rounds" in python("-m", "fedforward.cli", "verify", "out")
