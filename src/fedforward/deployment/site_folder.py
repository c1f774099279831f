"""The folders of a site's command: the one that it keeps, and one for its socket."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedforward.config.site import SiteConfig
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import check_new_folder, home
from fedforward.training.folder_lock import FolderLock


@contextmanager
def site_folders(settings: SiteConfig) -> Iterator[tuple[Path, Path]]:
    """`site.out`, locked for this process, and a private folder that is removed at the end.

    Raises:
        FedForwardError: `site.out` cannot be written, or another process has it.
    """
    out = home(settings.site.out)
    check_new_folder(out, "site.out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedForwardError(f"site.out = {settings.site.out!r}: {error.strerror}.") from error
    # Two sites in one folder would write each other's logs and results.
    lock = FolderLock(out, "site.out")
    lock.acquire()
    # A socket's path must be short, and its folder this user's alone.
    private = Path(tempfile.mkdtemp(prefix="fedforward-"))
    try:
        yield out, private
    finally:
        shutil.rmtree(private, ignore_errors=True)
        lock.release()
