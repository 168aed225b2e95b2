"""Processes that start in a blink: forks of one that has imported the libraries, which takes a new one seconds."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# What a run imports anyway; not the package itself, as a run may be of a copy of it.
FORKS.set_forkserver_preload([
    "monai.bundle", "monai.engines", "monai.handlers", "monai.networks.nets", "monai.optimizers", "monai.transforms",
    "ignite.handlers", "matplotlib.figure", "nibabel", "SimpleITK", "pydicom", "sklearn.linear_model",
    "torch.utils.tensorboard",
])  # fmt: skip


def run_module(module: str, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Do what ``python -m MODULE ARGUMENTS`` does in a folder, and return what ``subprocess.run`` would."""
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place) / name for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_run, args=(module, arguments, str(cwd), dict(os.environ), outputs))
        process.start()
        process.join(2400)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, 2400)
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in outputs))


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
