"""What the operating system says of this machine: cores, memory, processes.

Runs on Linux, macOS and Windows. What a system does not tell is None or the nearest figure that it
does tell, which each function names. Imports psutil and nothing of the package.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil

#: Open files that macOS grants where the limit that it names is "unlimited".
_MACOS_OPEN_FILES = 10_240


def usable_cores() -> int:
    """Cores that this process may use; all of the machine's where the system binds none (macOS)."""
    try:
        return len(psutil.Process().cpu_affinity())
    except (AttributeError, psutil.Error, OSError):
        return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that could be taken without swapping; None where the system does not tell."""
    try:
        return int(psutil.virtual_memory().available)
    except (psutil.Error, OSError, RuntimeError):
        return None


def peak_resident_bytes() -> int:
    """The largest resident size of this process so far, in bytes.

    Where the system keeps no such record, it is the size at this moment.
    """
    try:
        import resource
    except ImportError:
        memory = psutil.Process().memory_info()
        # Windows calls the resident size a working set.
        return int(getattr(memory, "peak_wset", memory.rss))
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def processor_name() -> str:
    """The processor's model; the architecture where the system does not tell."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            done = subprocess.run(command, capture_output=True, timeout=5, check=False)
            return done.stdout.decode("utf-8", "replace").strip() or platform.processor()
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def process_runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def raise_open_file_limit() -> int | None:
    """Let this process open as many files as it may; returns how many, None where none are counted.

    A server has a connection or two for each site.
    """
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, max(soft, _MACOS_OPEN_FILES)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            continue
        return wanted
    return soft
