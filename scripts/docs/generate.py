"""Write the pages of the site that are made from the code. Run by mkdocs-gen-files.

Each page has a function of its own in the modules beside this file. Nothing here is written into
the tree: the pages exist only within a build.
"""

import sys
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import pages  # noqa: E402

for name, text in pages.generated(ROOT).items():
    with mkdocs_gen_files.open(name, "w") as file:
        file.write(text)
