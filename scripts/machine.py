"""What this machine, or the part of it that a job or a container gives, has to offer."""

import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["RSS_UNIT", "cores", "free_memory", "peak_memory"]

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of what `resource` says of memory


def free_memory() -> int:
    """Tell how many bytes of memory this process may still take: the machine's, or less where a group has a limit."""
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the disk's cache holds is free too
        line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
        free = int(line.split()[1]) * 1024 if line else free
    return min([free, *_free_in_cgroups()])


def peak_memory(pid: int | None = None) -> int:
    """Tell the bytes that a process, by default this one, has held at most; 0 of another one where that is not known.

    What ``resource`` says starts from what the process held that started this one, so Linux is asked itself.
    """
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except OSError:  # no Linux, or the process has ended
        status = ""
    if found := re.search(r"VmHWM:\s*(\d+) kB", status):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT if pid is None else 0


def cores() -> int:
    """Tell how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_in_cgroups() -> Iterator[int]:
    """Tell what each limit leaves: of this process's group and those above it, of either version of cgroups."""
    own = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.exists() else []
    for _, controllers, place in (line.split(":", 2) for line in own):
        if controllers not in ("", "memory"):
            continue
        root = CGROUPS / controllers
        of_version = {
            "": ("memory.max", "memory.current"),
            "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        }
        folder = root / place.lstrip("/")
        for group in (group for group in (folder, *folder.parents) if group.is_relative_to(root)):
            most, used = (group / name for name in of_version[controllers])
            if most.exists() and used.exists() and (limit := most.read_text().strip()).isdigit():
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
                yield int(limit) - int(used.read_text()) + int(cached)
