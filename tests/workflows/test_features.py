"""Promises of inference: every voxel answered, every token in its place."""

import csv
import io
import json
import re
from contextlib import nullcontext
from functools import partial

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_KNOBS, asks_for_nothing, bundle, drawn_by_a_browser, noise, tiny, write_volume
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

from scripts import BertsWinEncoder
from scripts.engines import FeatureWindowInferer
from scripts.mistakes import Mistake
from scripts.weights import build_pretrained, fill
from scripts.workflows import (
    FeatureWriter,
    Placement,
    feature_affine,
    feature_report,
    place_in_window,
    principal_colours,
)
from scripts.workflows.feature_report import draw_thumbnail, group_by_folder

ENCODER = {name: value for name, value in TINY.items() if not name.startswith("decoder")}
ENCODER_KNOBS = {name: value for name, value in TINY_KNOBS.items() if name in (
    "img_size", "patch_size", "encoder_embed_dim", "encoder_depth", "encoder_num_heads", "swin_window_size",
    "stem_base_dim")}  # fmt: skip


class PatchMeans(torch.nn.Module):
    """Stands in for the encoder: the mean of each patch, so that features show where a bright spot is."""

    strict_stem = True

    def forward(self, volume):
        return torch.nn.functional.avg_pool3d(volume, 8).repeat(1, 4, 1, 1, 1)

    def forward_with_skips(self, volume):
        return torch.nn.functional.avg_pool3d(volume, 2), torch.nn.functional.avg_pool3d(volume, 4), self(volume)


def infer(**knobs):
    return bundle("run", "inference", "--config_file", str(ROOT / "configs" / "inference.json"), **knobs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(tiny().state_dict(), path)
    return path


@pytest.mark.parametrize("shape", [(32, 32, 32), (40, 64, 33), (3, 70, 31), (65, 20, 48)])
def test_padded_volumes_are_whole_patches_and_hold_the_volume(shape):
    volume = noise(1, *shape)
    padded, placement = place_in_window(volume, (32, 32, 32), 8, background=-5.0)
    inside = tuple(slice(b, b + s) for b, s in zip(placement.pad_before, shape, strict=True))
    assert all(side % 8 == 0 and side >= 32 for side in padded.shape[1:])
    assert torch.equal(padded[(slice(None), *inside)], volume)
    assert (padded == -5).sum() == padded.numel() - volume.numel()
    for tokens, before, size in zip(placement.tokens, placement.pad_before, shape, strict=True):
        assert tokens.start * 8 <= before < tokens.start * 8 + 8  # the first kept patch holds the first voxel
        assert tokens.stop * 8 - 8 < before + size <= tokens.stop * 8


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(32, 32, 32), (40, 72, 56), (32, 48, 104)])
def test_windows_agree_on_where_a_token_is(overlap, shape):
    inferer = FeatureWindowInferer((32, 32, 32), 8, overlap, batch_size=3, precision="fp32")
    volume = noise(1, 1, *shape)
    torch.testing.assert_close(inferer(volume, PatchMeans()), PatchMeans()(volume))
    for slid, whole in zip(inferer(volume, PatchMeans().forward_with_skips), PatchMeans().forward_with_skips(volume),
                           strict=True):  # fmt: skip
        torch.testing.assert_close(slid, whole)


def test_a_volume_of_one_window_gives_what_the_encoder_gives():
    encoder, volume = tiny().encoder, noise(1, 1, 32, 32, 32)
    inferer = FeatureWindowInferer((32, 32, 32), 8, precision="fp32")
    with torch.no_grad():
        torch.testing.assert_close(inferer(volume, encoder), encoder(volume))


def test_an_overlap_of_everything_is_refused():
    with pytest.raises(ValueError, match=r"overlap 1.0 must lie in \[0, 1\)"):
        FeatureWindowInferer((32, 32, 32), 8, overlap=1.0)


def test_the_affine_puts_each_token_at_the_centre_of_its_patch():
    placement = Placement(pad_before=(0, 3, 9), size=(16, 10, 20), patch_size=8)
    affine = np.diag([2.0, 1.0, 0.5, 1.0])
    tokens = feature_affine(affine, placement, stride=8)
    assert np.allclose(tokens @ [0, 0, 0, 1], [2 * 3.5, 3.5 - 3, 0.5 * (8 + 3.5 - 9), 1])
    assert np.allclose(tokens @ [1, 0, 0, 1] - tokens @ [0, 0, 0, 1], [16, 0, 0, 0])


def test_weights_of_the_encoder_alone_and_of_the_whole_network_both_load(tmp_path):
    model = tiny()
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "model.pt")
    torch.save(model.encoder.state_dict(), tmp_path / "encoder.pt")
    for name in ("model.pt", "encoder.pt"):
        encoder = fill(BertsWinEncoder(**ENCODER), tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), model.encoder.parameters(), strict=True))
    with pytest.raises(
        ValueError, match=r"do not fit this network of \d+ tensors: .* reshaped \(stem\.proj\.weight \(48,"
    ):
        fill(BertsWinEncoder(**(ENCODER | {"encoder_embed_dim": 96})), tmp_path / "model.pt")


def test_principal_colours_follow_the_largest_variance():
    features = 0.01 * noise(6, 4, 4, 4)
    features[2] += torch.linspace(-1, 1, 4)[:, None, None]
    red = principal_colours(features)[..., 0]
    assert red.shape == (4, 4, 4)
    steps = np.diff(red.mean(axis=(1, 2)))
    assert (steps > 0.2).all() or (steps < -0.2).all()


def marked_volume(path, affine, shape, voxel):
    """Write a dark volume with one bright ball around a voxel; return the ball's place in mm."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    ball = np.linalg.norm((places - voxel) * np.linalg.norm(affine[:3, :3], axis=0), axis=-1) < 8  # mm
    voxels = np.random.default_rng(0).normal(0, 1, shape) + 1000 * ball
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), affine), path)
    return (affine @ [*voxel, 1])[:3]


def oblique(spacing, flips, angle, origin):
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.array(spacing) * flips)
    affine[:3, 3] = origin
    return affine


@pytest.mark.parametrize(
    ("affine", "shape", "voxel", "spacing"),
    [
        (oblique((1, 1, 1), (1, 1, 1), 0, (0, 0, 0)), (48, 40, 36), (30, 10, 20), None),
        (oblique((1.5, 1.2, 2), (-1, -1, 1), 0, (60, 50, -30)), (50, 61, 37), (12, 44, 9), None),
        (oblique((1, 1, 3), (-1, 1, 1), 0.3, (-10, 20, 5)), (44, 70, 9), (33, 20, 4), None),
        (oblique((0.8, 0.8, 2.5), (1, -1, -1), 0.2, (5, 6, 7)), (90, 70, 20), (60, 12, 15), [1.0, 1.0, 1.0]),
        (np.array([[0, 0, 2.0, 9], [1, 0, 0, 3], [0, -1, 0, 70], [0, 0, 0, 1]]), (40, 64, 30), (9, 50, 22), None),
    ],
    ids=["plain", "LPS", "oblique-thin", "resampled", "sagittal"],
)
def test_features_overlay_the_volume_in_the_scanners_space(tmp_path, affine, shape, voxel, spacing):
    place = marked_volume(tmp_path / "data" / "marked.nii.gz", affine, shape, voxel)
    workflow = ConfigWorkflow(
        str(ROOT / "configs" / "inference.json"),
        workflow_type="infer",
        dataset_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "out"),
        spacing=spacing,
        network=PatchMeans(),
        pretrained="takes no weights.pt",
        save_skips=True,
        num_workers=0,
        **ENCODER_KNOBS,
    )
    workflow.initialize()
    workflow.run()
    for name, stride in (("features", 8), ("skip_2", 4), ("skip_1", 2)):
        features = nib.load(tmp_path / "out" / "marked" / f"{name}.nii.gz")
        means = np.asarray(features.dataobj)[..., 0]
        bright = means - np.median(means)
        bright[bright < bright.max() / 10] = 0
        centre = (np.argwhere(bright >= 0) * bright.reshape(-1, 1)).sum(axis=0) / bright.sum()
        found = (features.affine @ [*centre, 1])[:3]
        step = stride * np.linalg.norm(spacing or np.linalg.norm(affine[:3, :3], axis=0))
        assert np.linalg.norm(found - place) < step / 2, name


@pytest.mark.slow
def test_a_folder_with_a_bad_file_is_answered_and_the_bad_one_named(tmp_path, checkpoint):
    data, out = tmp_path / "data", tmp_path / "out"
    write_volume(data / "one" / "scan.nii.gz", shape=(50, 40, 12))
    write_volume(data / "two.nii", shape=(33, 34, 35), seed=1)
    (data / "broken.nii.gz").write_bytes(b"nothing")
    nib.save(nib.Nifti1Image(np.full((20, 20, 20), 3.0), np.eye(4)), data / "flat.nii.gz")
    result = infer(dataset_dir=data, output_dir=out, pretrained=checkpoint, spacing="null", **ENCODER_KNOBS)
    assert result.returncode == 1
    assert "2 of 4 volumes have no features" in result.stderr
    assert "broken: " in result.stderr
    assert "flat: is constant" in result.stderr
    assert "Traceback" not in result.stderr

    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "embeddings.csv",
        *("one/scan/features.nii.gz", "one/scan/figure.png", "report.html", "two/features.nii.gz", "two/figure.png"),
    ]
    page = (out / "report.html").read_text()
    asks_for_nothing(page)
    assert f"Features: {data.name}" in page
    assert "Features of 2 of 4 volumes are here" in page
    assert nib.load(out / "one" / "scan" / "features.nii.gz").shape == (7, 5, 2, 48)
    rows = list(csv.DictReader((out / "embeddings.csv").open()))
    assert [row["case"] for row in rows] == ["one/scan", "two"]
    assert len(rows[0]) == 49


@pytest.mark.slow
def test_inference_without_weights_ends_with_a_message(cohort, tmp_path):
    result = infer(dataset_dir=cohort, output_dir=tmp_path, pretrained=tmp_path / "gone.pt")
    assert result.returncode == 1
    assert f"error: there is no checkpoint at {tmp_path / 'gone.pt'}" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_inference_config_is_complete_and_documents_every_knob(cohort, tmp_path, checkpoint):
    workflow = ConfigWorkflow(
        str(ROOT / "configs" / "inference.json"),
        workflow_type="infer",
        dataset_dir=str(cohort),
        output_dir=str(tmp_path),
        pretrained=str(checkpoint),
        **ENCODER_KNOBS,
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    config = json.loads((ROOT / "configs" / "inference.json").read_text())
    names = list(config)
    assert names[names.index("bundle_root") : names.index("intensities")] == [
        *("bundle_root", "dataset_dir", "output_dir", "pretrained"),
        *(name for name in names if name in config["_knobs_"] and name not in
          ("bundle_root", "dataset_dir", "output_dir", "pretrained")),
    ]  # fmt: skip
    assert config["_knobs_"].keys() <= config.keys()


def run_here(tmp_path, network, **knobs):
    workflow = ConfigWorkflow(
        str(ROOT / "configs" / "inference.json"),
        workflow_type="infer",
        output_dir=str(tmp_path / "out"),
        network=network,
        pretrained="takes no weights.pt",
        num_workers=0,
        **(ENCODER_KNOBS | knobs),
    )
    workflow.initialize()
    workflow.run()


class FailsOnBright(PatchMeans):
    """Runs out of memory, as it were, on one volume; answers another with what is no number."""

    def forward(self, volume):
        if volume[volume > -1].std() < 0.2:
            raise RuntimeError("out of memory")
        return super().forward(volume)


def test_a_volume_that_fails_on_the_way_does_not_cost_the_others(tmp_path):
    write_volume(tmp_path / "data" / "a_cost_$5_and_$6.nii.gz")
    voxels = np.full((20, 20, 20), 50.0) + np.random.default_rng(0).normal(0, 0.1, (20, 20, 20))
    voxels[::5, ::5, ::5] += 50
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "data" / "b_narrow.nii.gz")
    write_volume(tmp_path / "data" / "c.nii.gz", seed=1)
    (tmp_path / "data" / "d_gone.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    stale = tmp_path / "out" / "b_narrow" / "features.nii.gz"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    with pytest.raises(RuntimeError) as caught:
        run_here(tmp_path, FailsOnBright(), dataset_dir=str(tmp_path / "data"))
    message = str(caught.value.__cause__)
    assert "2 of 4 volumes have no features" in message
    assert "b_narrow: out of memory" in message
    assert "d_gone: " in message
    assert not stale.exists()
    for case in ("a_cost_$5_and_$6", "c"):
        assert sorted(path.name for path in (tmp_path / "out" / case).iterdir()) == ["features.nii.gz", "figure.png"]
    rows = list(csv.DictReader((tmp_path / "out" / "embeddings.csv").open()))
    assert [row["case"] for row in rows] == ["a_cost_$5_and_$6", "c"]


def answer(case, embedding, shape=(4, 4, 4)):
    """Make what ExtractFeatures returns."""
    maps = {"features": MetaTensor(torch.ones(len(embedding), 1, 1, 1), affine=torch.eye(4))}
    image = MetaTensor(noise(1, *shape), affine=torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0])))
    return {"case": case, "image": image, "embedding": torch.tensor(embedding), "maps": maps}


def written(folder, answers, failures=()):
    """Write the page of an inference with these answers; return its text."""
    writer = FeatureWriter(folder, figures=False)
    evaluator = Engine(lambda _, item: item)
    writer.attach(evaluator)
    with pytest.raises(Mistake) if failures else nullcontext():
        evaluator.run([*answers, *({"case": case, "error": "broken"} for case in failures)])
    return (folder / "report.html").read_text()


def test_the_page_maps_every_volume_to_its_place_with_a_thumbnail_and_a_link(tmp_path):
    evil = "<script>alert(1)"
    spots = {"a/one": [0.0, 0.0], "a/two": [0.1, 0.0], f"b/{evil} 100%": [9.0, 1.0], "b/far": [9.0, 0.0]}
    page = written(tmp_path, [answer(case, spot) for case, spot in spots.items()], failures=[evil])
    asks_for_nothing(page)
    assert "Features of 4 of 5 volumes are here" in page
    assert "&lt;script&gt;alert(1): broken" in page
    assert page.count("data:image/jpeg;base64,") == 4
    assert 'href="./b/%3Cscript%3Ealert%281%29%20100%25/"' in page
    places = [float(left) for left in re.findall(r'class="point c\d" href=[^>]*style="left: ([\d.]+)%', page)]
    order = sorted(places)
    assert order[1] - order[0] < 5 < 80 < order[2] - order[1]  # two and two
    assert 4 <= order[0] <= order[-1] <= 96
    assert set(re.findall(r'"point (c\d)"', page)) == {"c0", "c1"}  # by folder
    assert drawn_by_a_browser(tmp_path / "report.html").std() > 0.05


def test_the_page_does_not_replace_that_of_a_training(tmp_path):
    for name in ("metrics.jsonl", "report.html"):
        (tmp_path / name).touch()
    with pytest.raises(Mistake, match="holds a training: choose another --output_dir"):
        written(tmp_path, [answer("a", [0.0, 0.0])])
    assert (tmp_path / "report.html").exists()


def test_volumes_are_coloured_by_the_deepest_folders_that_colours_suffice_for():
    cases = [f"site_{n % 3}/subject_{n}/anat/T1w" for n in range(12)]
    assert group_by_folder(cases) == [f"site_{n % 3}" for n in range(12)]
    assert group_by_folder(cases[:8]) == [case.removesuffix("/T1w") for case in cases[:8]]
    assert group_by_folder(["a/x", "y"]) == ["a", ""]


def test_a_thumbnail_has_the_proportions_of_the_scan_in_mm():
    thumbnail = draw_thumbnail(answer("a", [0.0], shape=(20, 30, 4))["image"])  # 20 by 60 mm
    assert matplotlib.image.imread(io.BytesIO(thumbnail), format="jpeg").shape[:2] == (96, 32)


def test_a_page_of_many_volumes_shows_some_of_them_evenly_chosen_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_report, "SHOWN", 4)
    page = written(tmp_path, [answer(f"scan_{n}", [float(n), 0.0]) for n in range(10)])
    assert "This page shows 4 of them, evenly chosen; embeddings.csv holds all." in page
    assert re.findall(r"<td><a href=\"./scan_(\d)/", page) == ["0", "3", "6", "9"]


@pytest.mark.parametrize("embeddings", [[], [0.0, 1.0], [1.0, 1.0, 1.0, 2.0]])
def test_fewer_than_three_different_volumes_make_a_page_without_a_map(tmp_path, embeddings):
    page = written(tmp_path, [answer(f"scan_{n}", [value, 0.0]) for n, value in enumerate(embeddings)], ["broken"])
    assert "A map needs three different volumes or more." in page
    assert f"Features of {len(embeddings)} of {len(embeddings) + 1} volumes are here" in page


def test_the_embeddings_are_valid_csv_whatever_a_case_is_called(tmp_path):
    names = ["na,me;x", 'the "best", one', "two\nlines", "plain"]
    writer = FeatureWriter(tmp_path, figures=False)
    for number, name in enumerate(names):
        writer.write(answer(name, [number, 0.5]))
    with (tmp_path / "embeddings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], float(row["f0"]), float(row["f1"])) for row in rows] == [
        (name, number, 0.5) for number, name in enumerate(names)
    ]


def test_nothing_is_written_outside_the_output_folder(tmp_path):
    elsewhere = write_volume(tmp_path / "scans" / "a.nii.gz")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "l.json").write_text(json.dumps({"training": [{"image": str(elsewhere)}]}))
    run_here(tmp_path, PatchMeans(), dataset_dir=str(tmp_path / "lists" / "l.json"), figures=False)
    assert [path.name for path in (tmp_path / "scans").iterdir()] == ["a.nii.gz"]
    assert len(list((tmp_path / "out").rglob("features.nii.gz"))) == 1


def test_a_volume_that_resampling_would_blow_up_is_refused_by_its_size(tmp_path):
    write_volume(tmp_path / "data" / "a.nii.gz", shape=(40, 40, 40), spacing=2.0)
    with pytest.raises(RuntimeError) as caught:
        run_here(tmp_path, PatchMeans(), dataset_dir=str(tmp_path / "data"), spacing=[0.1] * 3, max_voxels=10**8)
    assert "a: would have 5.1e+08 voxels at a spacing of [0.1, 0.1, 0.1] mm, more than 1e+08" in str(
        caught.value.__cause__
    )


def test_weights_of_a_strict_stem_are_recognised(tmp_path):
    torch.save(tiny(strict_stem=True).state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"model\.pt has a strict stem, not what strict_stem False says: leave strict_stem out"
    ):
        build_pretrained(partial(BertsWinEncoder, **ENCODER), tmp_path / "model.pt", strict_stem=False)


@pytest.mark.parametrize("strict_stem", [False, True])
def test_skips_are_placed_where_their_kernels_are_centred(strict_stem):
    stem = tiny(strict_stem=strict_stem, patch_size=8).encoder.stem
    volume = torch.zeros(1, 1, 32, 32, 32, requires_grad=True)
    x = volume
    for level, stage in enumerate(stem.stages, start=1):
        x = stage[0](x)  # convolutions alone: group norm looks everywhere
        x = x + 0 * x
        (gradient,) = torch.autograd.grad(
            x[0, :, 2, 2, 2].square().sum() + x[0, :, 2, 2, 2].sum(), volume, retain_graph=True
        )
        seen = gradient[0, 0].abs().amax(dim=(1, 2)).nonzero().flatten().float()
        centre = (seen.min() + seen.max()) / 2
        placement = Placement((0, 0, 0), (32, 32, 32), 8)
        affine = feature_affine(np.eye(4), placement, 2**level, None if strict_stem else 0.0)
        assert (affine @ [2, 0, 0, 1])[0] == pytest.approx(centre.item())


def test_features_are_the_same_in_every_format_and_those_of_another_are_removed(tmp_path):
    write_volume(tmp_path / "data" / "a.nii.gz")
    network, folder = tiny().encoder, tmp_path / "out" / "a"
    for form, kept in (
        ("nii.gz", ["features.nii.gz"]),
        ("nii", ["features.nii"]),
        ("npz", ["features.npz"]),
        ("none", []),
    ):
        run_here(tmp_path, network, dataset_dir=str(tmp_path / "data"), features=form, figures=False)
        assert [path.name for path in folder.iterdir()] == kept
        if form == "nii.gz":
            expected, affine = nib.load(folder / "features.nii.gz").get_fdata(), nib.load(folder / kept[0]).affine
            table = (tmp_path / "out" / "embeddings.csv").read_text()
        elif form == "nii":
            assert np.array_equal(nib.load(folder / "features.nii").get_fdata(), expected)
        elif form == "npz":
            with np.load(folder / "features.npz") as archive:
                assert np.array_equal(archive["features"], expected)
                assert np.array_equal(archive["affine"], affine)
        assert (tmp_path / "out" / "embeddings.csv").read_text() == table


def test_half_precision_is_half_as_large_and_needs_a_format_that_has_it(tmp_path):
    write_volume(tmp_path / "data" / "a.nii.gz")
    knobs = {"dataset_dir": str(tmp_path / "data"), "features": "npz", "figures": False}
    found = []
    for dtype in ("float32", "float16"):
        torch.manual_seed(0)
        run_here(tmp_path, tiny().encoder, save_dtype=dtype, **knobs)
        with np.load(tmp_path / "out" / "a" / "features.npz") as archive:
            found.append(archive["features"])
    assert [values.dtype.name for values in found] == ["float32", "float16"]
    assert np.abs(found[0] - found[1]).max() <= 2**-11 * np.abs(found[0]).max()
    with pytest.raises(RuntimeError) as caught:
        run_here(tmp_path, tiny().encoder, **knobs | {"features": "nii"}, save_dtype="float16")
    assert "save_dtype float16 needs --features npz: nii has no half precision" in str(caught.value.__cause__)
