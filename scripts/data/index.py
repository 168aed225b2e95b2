"""What is known of each volume of a cohort: read once, remembered beside the run, brought up to date at every start."""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import ignite.distributed as idist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .. import machine, parallel
from .describing import Case, describe_volume
from .dicom import is_dicom
from .reading import data_files
from .searching import PAIRS, longest_suffix, other_half

__all__ = ["Index", "case_files", "fingerprint"]

logger = logging.getLogger(__name__)

VERSION = 1  # of what is known of a volume; another one is read again


class Index:
    """What :func:`~bertswin_mae.data.describe_volume` says of volumes, kept in a file with a line of JSON for each.

    A volume is read again when its files change (path, size or time). Lines are written as volumes are read, so that a
    pass that is killed goes on where it was. Several ranks write a file each, and know what all have read.

    Args:
        path: of the file; None: nothing is remembered.
        pretrained: weights in the ``checkpoints`` of another run, whose file is looked up too.
        num_workers: processes that read.
    """

    def __init__(self, path: str | Path | None, pretrained: str | Path | None = None, num_workers: int = 0) -> None:
        self.path, self.num_workers = None if path is None else Path(path), num_workers
        files = [] if pretrained is None else [Path(pretrained).absolute().parent.parent / "index.jsonl"]
        self.lines: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        for file in (*files, *([] if self.path is None else [self.path])):
            stem, suffix = glob.escape(file.stem), glob.escape(file.suffix)
            for part in (file, *sorted(file.parent.glob(f"{stem}.[0-9]*{suffix}"))):
                self.lines |= _read_lines(part)

    def describe(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """Tell what is known of each case, after what is new or changed was read; the ranks share that work."""
        rank, ranks = idist.get_rank(), idist.get_world_size()
        keys = [self._key(case) for case in cases]
        unknown = {key: case for key, case in zip(keys, cases, strict=True) if key not in self.lines}
        # The ranks may have found different lines, as one of them was writing: they read what any of them lacks.
        lacking = {key for part in idist.all_gather(list(unknown)) for key in part} if ranks > 1 else unknown.keys()
        unknown = {key: case for key, case in zip(keys, cases, strict=True) if key in lacking}
        if unknown:
            logger.info("reading %d of %d volumes, the others are known", len(unknown), len(cases))
        found = self._read([*unknown.items()][rank::ranks])
        for part in idist.all_gather(found) if ranks > 1 else [found]:
            self.lines |= part
        return [self.lines[key] for key in keys]

    def remember(self, files: Sequence[Path], read: Callable[[], Any]) -> Any:
        """Return what is known of some files together, such as their headers; what is not is read, and written down."""
        key = f"headers {fingerprint(files)}"  # a case of the same files has a line of its own
        if key not in self.lines:
            self.lines[key] = {"headers": read()}
            with _lines_behind(self._own_file()) as file:
                file.write(json.dumps({"key": key, **self.lines[key]}) + "\n")
        return self.lines[key]["headers"]

    def _own_file(self) -> Path | None:
        """Name the file that this rank writes."""
        rank = idist.get_rank()
        return self.path if self.path is None or rank == 0 else self.path.with_stem(f"{self.path.stem}.{rank}")

    def _key(self, case: Case) -> str:
        image = repr(case["image"])
        if image not in self.keys:  # once a process: a cohort may have millions of slices
            self.keys[image] = fingerprint(case_files(case))
        return self.keys[image]

    def _read(self, cases: Sequence[tuple[str, Case]]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        if not cases:
            return found
        workers = min(self.num_workers, machine.cores(), len(cases) // 8)  # a process costs as much as some volumes
        ahead = 16 if workers else None
        # As they are: torch would look for arrays in them.
        loader = DataLoader(
            _Described(cases), batch_size=None, num_workers=workers, prefetch_factor=ahead, collate_fn=dict
        )
        bar = tqdm(loader, "reading", unit="volume", leave=False, disable=not parallel.shows_progress())
        with _lines_behind(self._own_file()) as file:
            for (key, case), line in zip(cases, bar, strict=True):
                found[key] = line
                file.write(json.dumps({"case": case.get("case"), "key": key, **line}) + "\n")
        return found


class _Described(Dataset):
    def __init__(self, cases: Sequence[tuple[str, Case]]) -> None:
        self.cases = cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return describe_volume(self.cases[place][1])


def case_files(case: Case, keys: Iterable[str] = ("image",)) -> list[Path]:
    """List the files of a case, of one or more of its keys; a folder of DICOM stands for the files in it.

    Behind a header, such as ``a.mhd`` or ``a.img``, stand the files of its voxels or the other half of the pair.
    """
    files: list[Path] = []
    for key in keys:
        paths = case.get(key) or []
        for path in map(Path, paths if isinstance(paths, list | tuple) else [paths]):
            files += sorted(filter(is_dicom, path.iterdir())) if path.is_dir() else [path]
            if longest_suffix(path, PAIRS):
                files += [half for half in [other_half(path)] if half]
            elif longest_suffix(path, (".mhd", ".nhdr")):
                files += [file for file in data_files(path) if file.is_file()]
    return files


def fingerprint(files: Sequence[Path]) -> str:
    """Name a state of files, by their paths, sizes and times of change."""
    states = []
    for path in files:
        about = path.stat() if path.exists() else None
        states.append((str(path.absolute()), about and (about.st_size, about.st_mtime_ns)))
    return hashlib.sha256(json.dumps([VERSION, states]).encode()).hexdigest()[:32]


def _read_lines(path: Path) -> dict[str, dict[str, Any]]:
    lines: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return lines
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            about = json.loads(line)
            about.pop("case", None)  # which is for readers
            key = about.pop("key")
            # What cannot be read today may be tomorrow: the file system's fault, or a decoder that was not installed.
            if "problem" not in about and None not in about.get("headers", []):
                lines[key] = about
        except (ValueError, KeyError, AttributeError, TypeError):  # noqa: PERF203
            continue  # empty, or cut off when its run was killed
    return lines


def _lines_behind(path: Path | None) -> TextIO:
    """Open a file to write lines behind those that are there, of which the last may be cut off."""
    if path is None:
        return Path(os.devnull).open("w")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8", buffering=1)
    if file.tell():
        file.write("\n")
    return file
