"""Promises of the release: what is published is the bundle and nothing else, and MONAI's tools bring it to a user."""

import functools
import http.server
import json
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from zipfile import ZipFile

import monai
import pytest
import torch
import yaml
from conftest import ROOT, bundle, copy_bundle, write_volume
from test_configs import REQUIRED

from scripts import release
from scripts.networks import BertsWinEncoder
from scripts.weights import read_record

pytestmark = pytest.mark.slow


def git(folder, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True)  # noqa: S603, S607


def committed(place):
    """Put the bundle into a repository of its own, everything committed."""
    copy_bundle(place)
    git(place.parent, "init", "-q", str(place))
    git(place, "add", "-A")
    git(place, "commit", "-qm", "all")
    return place


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of the test's own."""
    monkeypatch.setattr(release, "ROOT", committed(tmp_path / "repository"))
    return release.ROOT


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    path = tmp_path_factory.mktemp("schema") / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": REQUIRED}))
    return str(path)


@pytest.fixture(scope="module")
def built(schema, tmp_path_factory):
    """The zip, built once."""
    place = tmp_path_factory.mktemp("release")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release, "ROOT", committed(place / "repository"))
        return release.build(str(place / "dist"), schema)


@pytest.fixture
def server(tmp_path):
    """A web server on the loopback interface; gives the folder that it serves and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def version_of(folder: Path) -> str:
    return json.loads((folder / "configs" / "metadata.json").read_text())["version"]


def test_the_zip_holds_the_committed_bundle_and_nothing_else(built):
    assert built.name == f"bertswin_mae_v{version_of(ROOT)}.zip"
    with ZipFile(built) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    assert {name.split("/")[1] for name in names} == set(release.CONTENTS)
    assert {"bertswin_mae/configs/train.yaml", "bertswin_mae/models/model.pt", "bertswin_mae/LICENSE"} <= names
    assert "bertswin_mae/scripts/networks/__init__.py" in names
    apart = ("test", "experiments", "peers", ".nii.gz", ".pyc")
    assert not [name for name in names if any(part in name for part in apart)]
    assert built.stat().st_size < 20 * 2**20


def test_what_is_not_committed_is_not_published(repository, schema, tmp_path):
    (repository / "docs" / "new.md").write_text("new")
    with pytest.raises(ValueError, match=r"(?s)these are not.*docs/new.md"):
        release.build(str(tmp_path / "dist"), schema)
    assert not list(Path(tmp_path).glob("dist/*"))


def test_a_release_says_which_tag_to_set(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(release, "check", lambda *_: None)
    release.build(str(tmp_path / "dist"))
    tag, push = (line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[-2:])
    git(repository, *shlex.split(tag))
    name = f"v{version_of(ROOT)}"
    assert push == f"push origin {name}"
    assert (repository / ".git" / "refs" / "tags" / name).is_file()


def test_without_a_network_one_line_says_how_to_check_the_metadata(built, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr("urllib.request._opener", None)
    with pytest.raises(
        ValueError, match=r"^the schema cannot be downloaded \(.*\): --schema FILE takes a copy of https://\S+$"
    ):
        release.check(str(built))


def test_metadata_against_the_schema_are_refused(built, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object", "required": ["colour"]}))
    with pytest.raises(ValueError, match=r"(?s)zip cannot be published.*'colour' is a required property"):
        release.check(str(built), str(tmp_path / "schema.json"))


class Code:
    def __reduce__(self):
        return (print, ("code was run",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("docs/scan.nii.gz", None, "scan.nii.gz is not of a kind that is published"),
        ("models/code.pt", Code(), "code.pt"),
        ("docs/id_rsa", "key", "id_rsa is not of a kind that is published"),
        ("configs/patients.json", "key", "patients.json is not of a kind that is published"),
        ("docs/.hidden.md", "key", "hidden.md is not of a kind that is published"),
        ("scripts/networks/notes.txt", "key", "notes.txt is not of a kind that is published"),
        ("models/model.pt", {"weight": torch.zeros(1)}, "weights in metadata.json, with their sha256, are not those"),
        ("models/nested.pt", {"network": {"weight": torch.zeros(1)}}, "nested.pt does not hold flat weights"),
        ("models/large.pt", {"weight": torch.zeros(5 * 2**20)}, "large.pt is larger than 16 MB"),
    ],
)
def test_data_code_and_what_is_too_large_are_refused(
    repository, schema, tmp_path, capfd, monkeypatch, name, content, message
):
    if content is None:
        write_volume(repository / name)
    elif content == "key":
        (repository / name).write_text("secret")
    else:
        torch.save(content, repository / name)
    git(repository, "add", "-A", "-f")
    git(repository, "commit", "-qm", "more")
    with pytest.raises(ValueError, match=message):
        release.build(str(tmp_path / "dist"), schema)
    assert not list(Path(tmp_path).glob("dist/*"))
    assert "code was run" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["scripts/experiments/peers.py", "configs/peers/unet.yaml", "tests/conftest.py"])
def test_a_zip_with_comparisons_or_tests_is_refused(built, schema, tmp_path, name):
    more = Path(shutil.copy(built, tmp_path))
    with ZipFile(more, "a") as file:
        file.write(ROOT / name, f"bertswin_mae/{name}")
    with pytest.raises(ValueError, match=f"{name} is not of a kind that is published"):
        release.check(str(more), schema)


def test_from_a_download_to_features_and_to_the_network(built, server, tmp_path, monkeypatch):
    served, address = server
    shutil.copy(built, served)
    bundles = tmp_path / "bundles"
    downloaded = bundle(
        "download", "--name", "bertswin_mae", "--url", f"{address}/{built.name}", "--bundle_dir", str(bundles)
    )
    assert downloaded.returncode == 0, downloaded.stderr
    for number in range(2):
        write_volume(tmp_path / "scans" / f"{number}.nii.gz", seed=number)
    extracted = bundle(
        *("run", "inference", "--config_file", "configs/inference.json"),
        cwd=bundles / "bertswin_mae",
        dataset_dir=tmp_path / "scans",
        output_dir=tmp_path / "features",
    )
    assert extracted.returncode == 0, extracted.stderr
    assert (tmp_path / "features" / "0" / "features.nii.gz").exists()

    monkeypatch.setattr(sys, "path", [*sys.path])
    network = monai.bundle.load("bertswin_mae", bundle_dir=str(bundles), workflow_type="inference", source="github")
    weights = torch.load(bundles / "bertswin_mae" / "models" / "model.pt", weights_only=True)
    assert type(network).__name__ == BertsWinEncoder.__name__
    assert network(torch.rand(1, 1, 64, 64, 64)).shape == (1, 192, 8, 8, 8)
    assert all(torch.equal(network.state_dict()[name], weight) for name, weight in weights.items())


def test_the_model_zoos_unit_test_passes_on_what_is_published(built, tmp_path):
    with ZipFile(built) as file:
        file.extractall(tmp_path / "models")
    test = ROOT / "ci" / "unit_tests" / "test_bertswin_mae.py"
    ended = subprocess.run([sys.executable, test], cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S603
    assert ended.returncode == 0, ended.stderr


def test_an_upgrade_replaces_the_old_version_as_the_docs_say(built, server, tmp_path):
    served, address = server
    bundles = tmp_path / "bundles"
    old = bundles / "bertswin_mae"
    (old / "configs").mkdir(parents=True)
    (old / "configs" / "metadata.json").write_text(json.dumps({"version": "0.0.1", "monai_version": "1.6.1"}))
    (old / "configs" / "gone.yaml").write_text("{}")
    shutil.copy(built, served)
    arguments = ["download", "--name", "bertswin_mae", "--url", f"{address}/{built.name}", "--bundle_dir", str(bundles)]
    assert bundle(*arguments).returncode == 0
    kept = version_of(old)
    shutil.rmtree(old)
    (bundles / "bertswin_mae.zip").unlink()
    assert bundle(*arguments).returncode == 0
    assert (kept, version_of(old)) == ("0.0.1", version_of(ROOT))  # MONAI leaves a folder that is there alone
    assert not (old / "configs" / "gone.yaml").exists()


@pytest.mark.parametrize("hash_val", ["right", "wrong", "missing"])
def test_large_weights_are_fetched_and_a_wrong_hash_is_noticed(repository, server, hash_val):
    served, address = server
    weights = repository / "models" / "large.pt"
    torch.save({"weight": torch.arange(5.0)}, weights)
    shutil.copy(weights, served)
    release.large_files({"models/large.pt": f"{address}/large.pt"}, str(repository))
    weights.unlink()
    listing = yaml.safe_load((repository / "large_files.yml").read_text())
    (entry,) = listing["large_files"]
    assert entry.keys() == {"path", "url", "hash_val", "hash_type"}
    if hash_val == "wrong":
        entry["hash_val"] = "0" * 64
    elif hash_val == "missing":
        del entry["hash_val"]
    (repository / "large_files.yml").write_text(yaml.safe_dump(listing))
    fetched = bundle("download_large_files", "--bundle_path", str(repository))
    if hash_val == "wrong":
        assert fetched.returncode != 0
        assert "hash check of downloaded file failed" in fetched.stderr
        assert not weights.exists()
    else:  # MONAI takes a file without a hash as it comes
        assert fetched.returncode == 0, fetched.stderr
        assert torch.load(weights, weights_only=True)["weight"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.thorough
def test_large_weights_may_lie_beside_what_is_built_once_they_are_listed(repository, schema, tmp_path):
    weights = repository / "models" / "base.pt"
    torch.save({"weight": torch.zeros(5 * 2**20)}, weights)  # beyond 16 MB
    with pytest.raises(ValueError, match=r"(?s)these are not.*models/base.pt"):
        release.build(str(tmp_path / "dist"), schema)
    release.large_files({"models/base.pt": "https://example.org/base.pt"}, str(repository))
    git(repository, "commit", "-qam", "listed")
    with ZipFile(release.build(str(tmp_path / "dist"), schema)) as file:
        assert "bertswin_mae/models/base.pt" not in file.namelist()
        assert b"https://example.org/base.pt" in file.read("bertswin_mae/large_files.yml")


def test_the_list_of_large_weights_takes_files_of_the_bundle_alone(repository, tmp_path):
    (tmp_path / "elsewhere.pt").touch()
    for path in ("../elsewhere.pt", "models/nowhere.pt"):
        with pytest.raises(ValueError, match="is no file of the bundle"):
            release.large_files({path: "https://example.org/x.pt"}, str(repository))


def test_the_folder_for_hugging_face_is_what_is_in_the_zip_and_weights_as_safetensors(built, tmp_path, capsys):
    pytest.importorskip("safetensors")
    built = Path(shutil.copy(built, tmp_path))
    folder = release.hugging_face("owner/bertswin_mae", str(built), str(tmp_path / "hub"))
    page = (folder / "README.md").read_text()
    assert page.startswith("---\nlicense:\n- apache-2.0\n- cc-by-sa-3.0\nlibrary_name: monai\n")
    with ZipFile(built) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    assert {f"bertswin_mae/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()} == {
        *names,
        "bertswin_mae/models/model.safetensors",
    }
    assert read_record(folder / "models/model.safetensors") == read_record(folder / "models/model.pt")
    printed = capsys.readouterr().out
    assert "hf upload owner/bertswin_mae" in printed
    assert f"hf repos tag create owner/bertswin_mae {version_of(ROOT)}\n" in printed
    with ZipFile(built, "a") as file:
        file.writestr("bertswin_mae/docs/scan.nii.gz", b"a patient")
    with pytest.raises(ValueError, match=r"scan\.nii\.gz is not of a kind"):
        release.hugging_face("owner/bertswin_mae", str(built), str(tmp_path / "other"))
    assert not list((tmp_path / "other").iterdir())


def test_a_folder_that_is_there_is_not_replaced(built, tmp_path):
    trained = tmp_path / "bertswin_mae" / "runs" / "pretraining" / "model.pt"
    trained.parent.mkdir(parents=True)
    trained.touch()
    with pytest.raises(ValueError, match="is there already: remove it"):
        release.hugging_face("owner/bertswin_mae", str(built), str(tmp_path))
    assert trained.exists()
