"""The model zoo's checks of pins and style, by the tools that it uses; they are downloaded, so this is opt-in."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.zoo

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TOOLS = ["black==26.10.1", "flake8==7.5.0", "flake8-bugbear==26.10.27", "flake8-comprehensions==3.17.0"]
TOOLS += ["isort==9.0.2", "pep8-naming==0.15.1", "uv==0.13.9"]
LINES = ("--line-length", "120")
IGNORED = "E203,E501,E741,W503,W504,C408,N812,B023"


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    """A function that runs one of the tools in the repository."""
    place = tmp_path_factory.mktemp("tools")
    for command in (["-m", "venv", place], ["-m", "pip", "--python", place, "install", "-q", *TOOLS]):
        subprocess.run([sys.executable, *command], check=True)  # noqa: S603

    def run(name, *arguments):
        command = [place / "bin" / name, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603

    return run


@pytest.mark.parametrize(
    "check",
    [
        ("black", "--check", *LINES, "--skip-magic-trailing-comma"),
        ("flake8", "--isolated", "--select=B,C,E,F,N,P,T4,W,B9", "--max-line-length=120", f"--ignore={IGNORED}"),
        ("isort", "--check", *LINES, "--profile", "black"),
    ],
    ids=lambda check: check[0],
)
def test_the_zoos_check_of_style_finds_nothing(tool, check):
    ended = tool(*check, "scripts", "ci", "setup.py")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("source", ["requirements.txt", "requirements-dev.txt", "metadata.json"])
def test_the_pins_can_be_installed(tool, python, source, tmp_path):
    if source == "metadata.json":
        metadata = json.loads((ROOT / "configs" / source).read_text())
        pins = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
        pins = {name: metadata[key] for name, key in pins.items()} | metadata["required_packages_version"]
        source = tmp_path / "requirements.txt"
        source.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    ended = tool("uv", "pip", "compile", source, "--python-version", python, "--only-binary=:all:", "--system-certs")
    assert ended.returncode == 0, ended.stderr
