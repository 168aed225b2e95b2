"""What this machine, or the part of it that a container gives, has to offer."""

import os
from pathlib import Path

__all__ = ["cores", "free_memory"]

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Tell how many bytes of memory this process may still take: the machine's, or less where its group has a limit."""
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the disk's cache holds is free too
        line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
        free = int(line.split()[1]) * 1024 if line else free
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, int(most) - int(used.read_text()) + int(cached.get("inactive_file", 0)))
    return free


def cores() -> int:
    """Tell how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
