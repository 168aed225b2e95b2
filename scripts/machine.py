"""What this machine, or the part of it that a job or a container gives, has to offer."""

import multiprocessing
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["RSS_UNIT", "CoreSeconds", "core_seconds", "cores", "free_memory", "peak_memory"]

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
OWN_CGROUP = PROC / "self" / "cgroup"
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
    """Tell how many cores this process may use: those of its affinity, or as many whole ones as a group's quota is."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([there, *map(int, _quotas())]))


class CoreSeconds(NamedTuple):
    """How long cores have been busy so far, added up."""

    all: float  # those that this process may use, whoever used them
    own: float  # used by this process and those that it has started
    there: int  # how many cores these are, whatever a quota leaves of them


def core_seconds() -> CoreSeconds | None:
    """Tell how busy the cores have been; None where the system does not say, as outside of Linux."""
    ticks = os.sysconf("SC_CLK_TCK") if "SC_CLK_TCK" in os.sysconf_names else 100
    try:
        lines = [line.split() for line in (PROC / "stat").read_text().splitlines() if line.startswith("cpu")]
        allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    # User, nice, system, then idle and waiting, then interrupts and what a host took away.
    busy = sum(int(part) for name, *parts in lines if name in allowed for part in (*parts[:3], *parts[5:8]))
    children = sum(_used(PROC / str(child.pid) / "stat") for child in multiprocessing.active_children())
    return CoreSeconds(busy / ticks, sum(os.times()[:4]) + children / ticks, len(allowed))


def _used(stat: Path) -> int:
    """Tell the ticks that a process has used: 0 of one that has ended."""
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _quotas() -> Iterator[float]:
    """Tell what each quota amounts to, in cores: of this process's group and those above it."""
    for group in _groups("cpu"):
        for most, period in (("cpu.max", None), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            if (group / most).exists():
                limit = (group / most).read_text().split()
                limit += (group / period).read_text().split() if period else []
                if limit[0].isdigit():  # neither "max" nor -1
                    yield int(limit[0]) / int(limit[1])


def _free_in_cgroups() -> Iterator[int]:
    """Tell what each limit leaves: of this process's group and those above it, of either version of cgroups."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for group in _groups("memory"):
        for most, used in ((group / most, group / used) for most, used in names):
            if most.exists() and used.exists() and (limit := most.read_text().strip()).isdigit():
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
                yield int(limit) - int(used.read_text()) + int(cached)


def _groups(controller: str) -> Iterator[Path]:
    """List the folders of this process's group and those above it, in either version of cgroups."""
    own = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.exists() else []
    for _, controllers, place in (line.split(":", 2) for line in own):
        if controllers == "" or controller in controllers.split(","):
            root = CGROUPS / controllers
            folder = root / place.lstrip("/")
            yield from (group for group in (folder, *folder.parents) if group.is_relative_to(root))
