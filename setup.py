"""Gives the package its version and its rooms; everything else stands in pyproject.toml."""

import json
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The package, and within it the bundle as it is in the repository: what `bertswin_mae.bundle_root()` tells.
HOMES = {"bertswin_mae": "scripts", "bertswin_mae.bundle": ".", "bertswin_mae.bundle.scripts": "scripts"}
ROOMS = find_packages(str(ROOT / "scripts"), exclude=["experiments", "experiments.*"])

setup(
    version=json.loads((ROOT / "configs" / "metadata.json").read_text())["version"],
    package_dir=HOMES,
    packages=[*HOMES, *(f"{home}.{room}" for home, place in HOMES.items() if place == "scripts" for room in ROOMS)],
)
