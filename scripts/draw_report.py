"""Draw docs/how-to/report-*.png: the page of the demonstration as a browser shows it.

    python scripts/draw_report.py RUN

RUN is the folder of a finished demonstration, such as `runs/demo`. It needs Chromium.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fedforward.reporting.page import make_page, write_page
from fedforward.reporting.record import read_run

TARGET = Path(__file__).parents[1] / "docs/how-to"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: Name of a picture, pixels wide and high, and whether the page is dark.
PICTURES = (("desktop", 1100, 1000, False), ("dark", 1100, 1000, True))
MOST_BYTES = 150_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"none of {', '.join(BROWSERS)} is installed", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(parser.parse_args().run, Path(folder) / "demo"))
        config = run / "config.toml"
        text = config.read_text(encoding="utf-8")
        # Where the package is installed says nothing to others.
        text = re.sub(r"(?m)^path = .*", 'path = "fedforward/demo/model"', text, count=1)
        config.write_text(text, encoding="utf-8")
        record = read_run(run)
        page = Path(folder) / "report.html"
        write_page(page, make_page([record]))
        for name, wide, high, dark in PICTURES:
            picture = TARGET / f"report-{name}.png"
            line = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            line += [f"--user-data-dir={folder}/profile", f"--window-size={wide},{high}"]
            line += ["--blink-settings=preferredColorScheme=0"] if dark else []
            line += [f"--screenshot={picture}", page.as_uri()]
            subprocess.run(line, check=True, capture_output=True)
            if picture.stat().st_size > MOST_BYTES:
                print(f"{picture} has more than {MOST_BYTES} bytes", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
