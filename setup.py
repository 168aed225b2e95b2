"""Gives the package the bundle's version; everything else stands in pyproject.toml."""

import json
from pathlib import Path

from setuptools import setup

setup(version=json.loads(Path(__file__).with_name("configs").joinpath("metadata.json").read_text())["version"])
