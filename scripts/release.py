"""Build what is published: the bundle as a zip, checked; the list of large weights; the folder for Hugging Face.

    python -m scripts.release large_files --urls "{'models/base.pt': 'https://…/base.pt'}"
    python -m scripts.release
    python -m scripts.release hugging_face --repo OWNER/bertswin_mae

The first is for weights that lie elsewhere, and what it writes is to be committed; the second is `build`. The version
and its changelog stand in `configs/metadata.json` alone. Nothing here uploads anything.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
import yaml
from monai.bundle import verify_metadata

from .convert import to_safetensors
from .mistakes import Mistake, command, reason
from .weights import bundle_version, load, sha256

__all__ = ["build", "check", "hugging_face", "large_files"]

ROOT = Path(__file__).resolve().parent.parent
NAME = "bertswin_mae"
# What a user of the bundle needs, and nothing else is ever published: no volumes, lists of them, archives, or keys.
PUBLISHED = (
    *("configs/*.yaml", "configs/inference.json", "configs/metadata.json", "configs/finished_*.json"),
    "configs/logging.conf",
    *("docs/*.md", "docs/data_license.txt", "docs/figures/*.png", "models/*.pt", "models/*.json"),
    *("scripts/*.py", "scripts/*/*.py", "scripts/*/*/*.py"),
    *("CITATION.cff", "LICENSE", "README.md", "large_files.yml", "pyproject.toml", "requirements.txt", "setup.py"),
)
CONTENTS = tuple(dict.fromkeys(pattern.split("/")[0] for pattern in PUBLISHED))
# Comparisons stay in the repository, with the configs that need them; so do tests, which are not of the contents.
LEFT_OUT = ("configs/peers", "scripts/experiments")
LARGEST = 16 * 2**20  # bytes of a file in the zip; what is larger goes through large_files.yml


def build(output_dir: str = "dist", schema: str | None = None, revision: str = "HEAD") -> Path:
    """Write ``bertswin_mae_v<version>.zip`` from the committed tree, check it as a user would find it, and return it.

    Args:
        output_dir: for the zip; one of the same version is replaced.
        schema: a copy of the schema that ``metadata.json`` names; without it MONAI downloads it.
        revision: what to publish; the default refuses while changes are not committed.

    Raises:
        Mistake: when anything is wrong with the tree; nothing is left then.
    """
    chosen = ("--", *CONTENTS, *(f":(exclude){folder}" for folder in LEFT_OUT))
    if revision == "HEAD":
        elsewhere = {
            f"?? {entry['path']}" for entry in yaml.safe_load(_git("show", "HEAD:large_files.yml"))["large_files"]
        }
        changed = _git("status", "--porcelain", "--untracked-files=all", *chosen).splitlines()
        if listing := "\n".join(line for line in changed if line not in elsewhere):
            raise Mistake(f"what is published is what is committed, but these are not:\n{listing}")
    version = json.loads(_git("show", f"{revision}:configs/metadata.json"))["version"]
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{NAME}_v{version}.zip"
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / target.name
        _git("archive", "--format=zip", f"--prefix={NAME}/", f"--output={made}", revision, *chosen)
        check(str(made), schema)
        made.replace(target)
    print(f"wrote {target} ({target.stat().st_size / 2**20:.1f} MB), sha256 {sha256(target)}; its tag here:")
    print(f"  git tag -a v{version} -m 'Version {version}' {_git('rev-parse', '--short', revision)}")
    print(f"  git push origin v{version}")
    return target


def check(archive: str, schema: str | None = None) -> None:
    """Unpack a zip and look at it with MONAI's tools and our own rules; a Mistake names what is wrong.

    Args:
        archive: the zip.
        schema: see :func:`build`.
    """
    with tempfile.TemporaryDirectory() as place:
        root = _unpack(archive, Path(place))
        if schema:
            shutil.copy(schema, Path(place) / "schema.json")  # where MONAI looks before it downloads
        metadata = root / "configs/metadata.json"
        try:
            verify_metadata(str(metadata), f"{place}/schema.json")
        except OSError as error:  # of the network
            url = json.loads(metadata.read_text())["schema"]
            raise Mistake(
                f"the schema cannot be downloaded ({reason(error)}): --schema FILE takes a copy of {url}"
            ) from error
        except ValueError as error:
            raise Mistake(f"{archive} cannot be published: {error}") from error
        network = ("--config_file", "configs/inference.json", "--net_id", "network_def", "--device", "cpu")
        check_shape = (sys.executable, "-m", "monai.bundle", "verify_net_in_out", "--meta_file", str(metadata))
        _run(*check_shape, *network, cwd=root)


def large_files(urls: Mapping[str, str], bundle_dir: str | Path = ROOT) -> None:
    """Write ``large_files.yml``: weights that lie elsewhere, each with the hash of the file that lies here.

    Args:
        urls: by path below the bundle, such as ``models/base.pt``; the file must be there to be hashed.
        bundle_dir: the bundle.

    Raises:
        Mistake: for a path that is not there, or leads out of the bundle.
    """
    root = Path(bundle_dir).resolve()
    entries = []
    for path, url in urls.items():
        file = (root / path).resolve()
        if root not in file.parents or not file.is_file():
            raise Mistake(f"{path} is no file of the bundle {root}")
        if problems := _problems(file, root, largest=None):
            raise Mistake("; ".join(problems))
        entries.append({"path": path, "url": url, "hash_val": sha256(file), "hash_type": "sha256"})
    listing = root / "large_files.yml"
    head = "".join(f"{line}\n" for line in listing.read_text().splitlines() if line.startswith("#"))
    listing.write_text(head + yaml.safe_dump({"large_files": entries}, sort_keys=False))
    print(f"wrote {listing}")


def hugging_face(repo: str, archive: str | None = None, output_dir: str = "dist/huggingface") -> Path:
    """Lay out the folder to upload, and print the command that does it.

    It holds what is in the zip, the weights also as safetensors, with the head that the hub reads on its front page.

    Args:
        repo: ``owner/name``.
        archive: the zip; default: that of this version in ``dist``.
        output_dir: for the folder.

    Raises:
        Mistake: when there is no zip, or something where the folder would be.
    """
    source = Path(archive or ROOT / "dist" / f"{NAME}_v{bundle_version(ROOT)}.zip")
    if not source.is_file():
        raise Mistake(f"there is no {source}: build it first, by python -m scripts.release build")
    folder = Path(output_dir).resolve() / NAME
    if folder.exists():  # it may be a bundle that somebody has trained in
        raise Mistake(
            f"{folder} is there already: remove it, if it is of an earlier release, or choose another --output_dir"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        root = _unpack(str(source), Path(place))
        for weights in root.glob("models/*.pt"):
            to_safetensors(str(weights), str(weights.with_suffix(".safetensors")))
        root.replace(folder)
    version = bundle_version(folder)
    tags = ["monai", "medical", "self-supervised"]
    header = {"license": ["apache-2.0", "cc-by-sa-3.0"], "library_name": "monai", "tags": tags}
    page = folder / "README.md"
    page.write_text(f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{page.read_text()}")
    upload = f"hf upload {repo} {folder} . --delete '*' --commit-message 'Version {version}'"
    print(f"wrote {folder}; to upload it (pip install huggingface_hub), in the place of what is there:\n  {upload}")
    print(f"MONAI finds a version by its tag on the hub:\n  hf repos tag create {repo} {version}")
    return folder


def _unpack(archive: str, place: Path) -> Path:
    """Unpack a zip, unless there is anything in it that must not be published."""
    try:
        with ZipFile(archive) as file:
            file.extractall(place)
    except BadZipFile as error:
        raise Mistake(f"{archive} is no zip: {error}") from error
    root = place / NAME
    if not (root / "configs/metadata.json").is_file() or list(place.iterdir()) != [root]:
        raise Mistake(f"{archive} should hold {NAME}/configs/metadata.json and nothing beside {NAME}")
    problems = [problem for path in sorted(root.rglob("*")) if path.is_file() for problem in _problems(path, root)]
    metadata = json.loads((root / "configs/metadata.json").read_text())
    if metadata["version"] not in metadata["changelog"]:
        problems.append(f"the changelog in metadata.json does not mention version {metadata['version']}")
    hashes = {path: about["sha256"] for path, about in metadata.get("weights", {}).items()}
    if hashes != {path.relative_to(root).as_posix(): sha256(path) for path in root.glob("models/*.pt")}:
        problems.append("the weights in metadata.json, with their sha256, are not those in models")
    if problems:
        raise Mistake(f"{archive} cannot be published:\n  " + "\n  ".join(problems))
    return root


def _problems(path: Path, root: Path, largest: int | None = LARGEST) -> list[str]:
    """Say why a file must not be published."""
    name = path.relative_to(root)
    problems = []
    patterns = [pattern for pattern in PUBLISHED if len(Path(pattern).parts) == len(name.parts)]
    is_comparison = any(name.is_relative_to(folder) for folder in LEFT_OUT)
    if name.name.startswith(".") or is_comparison or not any(name.match(pattern) for pattern in patterns):
        problems.append(f"{name} is not of a kind that is published")
    if largest is not None and path.stat().st_size > largest:
        problems.append(f"{name} is larger than {largest // 2**20} MB: list it in large_files.yml")
    if path.suffix == ".pt":
        try:
            content = load(path)  # weights only
        except Mistake as error:
            return [*problems, str(error)]
        # MONAI fills a network from nothing but flat weights, and says nothing when it cannot.
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            problems.append(f"{name} does not hold flat weights, a tensor by each name")
    return problems


def _git(*arguments: str) -> str:
    return _run("git", *arguments, cwd=ROOT)


def _run(*words: str, cwd: Path) -> str:
    ended = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)  # noqa: S603
    if ended.returncode:
        raise Mistake(f"{' '.join(words)} ended with {ended.returncode}:\n{ended.stderr.strip()[-2000:]}")
    return ended.stdout.strip()


if __name__ == "__main__":
    given = sys.argv[1:]
    command(
        {"build": build, "large_files": large_files, "hugging_face": hugging_face, "check": check},
        given if given and (given[0] == "--help" or not given[0].startswith("--")) else ["build", *given],
    )
