"""Processes that start in a blink: forks of one that has imported the libraries, which takes a new one seconds."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])  # found where pytest is started, at the top of the repository


def run_module(
    module: str, arguments: list[str], cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Do what ``python -m MODULE ARGUMENTS`` does in a folder, and return what ``subprocess.run`` would."""
    return run_ranks(module, arguments, cwd, [env or {}])


def run_ranks(
    module: str, arguments: list[str], cwd: Path, environments: Sequence[Mapping[str, str]]
) -> subprocess.CompletedProcess:
    """Do so in several processes at once, each with variables of its own; when one fails, the others are ended.

    Returns:
        The exit status of the first one that failed, or 0; what all have printed, one behind the other.
    """
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryDirectory() as place:
        outputs = [[Path(place) / f"{name}_{n}" for name in ("stdout", "stderr")] for n in range(len(environments))]
        processes = [
            FORKS.Process(target=_run, args=(module, arguments, str(cwd), {**os.environ, **own}, files))
            for own, files in zip(environments, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        deadline, failed = time.monotonic() + 2400, None
        while failed is None and any(process.is_alive() for process in processes):
            wait([process.sentinel for process in processes if process.is_alive()], timeout=1)
            failed = next((process for process in processes if process.exitcode), None)
            if time.monotonic() > deadline:
                failed = processes[0]
        time.sleep(0.5 if failed and len(processes) > 1 else 0)  # the others may say why themselves
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(command, 2400)
        texts = ("".join(files[stream].read_text() for files in outputs if files[stream].exists()) for stream in (0, 1))
        return subprocess.CompletedProcess(command, failed.exitcode if failed else 0, *texts)


class Started:
    """A module that runs in the background, with what tests need of :class:`subprocess.Popen`."""

    def __init__(self, module: str, arguments: list[str], cwd: Path) -> None:
        self._place = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._place.name) / name for name in ("stdout", "stderr")]
        self._process = FORKS.Process(target=_run, args=(module, arguments, str(cwd), dict(os.environ), self._outputs))
        self._process.start()
        self.pid, self.kill, self.poll = self._process.pid, self._process.kill, lambda: self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal where one ended it."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it to the process."""
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end."""
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired("a run", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, and return what it has printed."""
        self.wait(timeout)
        return tuple(path.read_text() for path in self._outputs)


def _run(module: str, arguments: list[str], cwd: str, environment: dict[str, str], outputs: list[Path]) -> None:
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    multiprocessing.set_start_method("fork", force=True)  # of its own processes: what a new one starts with on Linux
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    here = Path(__file__).parent
    sys.path[:] = [cwd, *(path for path in sys.path if Path(path or ".").resolve() not in (here, here.parent))]
    sys.argv[:] = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # a fork of multiprocessing leaves them out
