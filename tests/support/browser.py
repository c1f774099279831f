"""A headless Chromium, where there is one: how a page is laid out, and what it asks for."""

import re
import shutil
import subprocess
from pathlib import Path

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
#: What `drawn` gives of a page that is as it should be.
WELL = "beyond=0 tall=true pictures=true loaded="
_PROBE = (
    "<p id='r'></p><script>function look(f) { const d = f.contentDocument.documentElement;"
    "r.textContent = `beyond=${d.scrollWidth - d.clientWidth} tall=${d.scrollHeight > 800} "
    "pictures=${[...d.querySelectorAll('.picture svg')].every(s => "
    "s.getBoundingClientRect().height > 60)} loaded=${f.contentWindow.performance."
    "getEntriesByType('resource').map(e => e.name).join(' ')}` }</script>"
    '<iframe onload="look(this)" src="page.html" '
    'style="width:WIDTHpx;height:800px;border:0"></iframe>'
)


def drawn(page: str, width: int, folder: Path) -> str:
    """What the browser says of a page in a window of so many pixels.

    How far it goes beyond the window, whether it has more than a screen, whether its pictures have
    height, and which addresses it has loaded. The script that asks for it is this test's alone.
    """
    (folder / "page.html").write_text(page, encoding="utf-8")
    probe = folder / "probe.html"
    probe.write_text(_PROBE.replace("WIDTH", str(width)), encoding="utf-8")
    line = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=5000", probe.as_uri()]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r"<p id=.r.>(.*?)</p>", done.stdout)
    assert found is not None, done.stdout + done.stderr
    return found[1]
