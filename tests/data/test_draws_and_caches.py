"""Promises of caching and drawing: all randomness is a function of the seed."""

import collections
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_KNOBS, started, write_volume
from monai.transforms import Compose, Lambdad, RandGaussianNoised, ScaleIntensityd
from processes import FORKS

from scripts.data import DrawnDataset, DrawSampler, build_dataset
from scripts.data.caches import _hash_file


def draws(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_case_is_drawn_equally_often_in_full_batches():
    sampler = DrawSampler(num_cases=7, batch_size=4, seed=1)
    assert len(sampler) == 8  # one pass, rounded up to full batches
    counts = collections.Counter(draw.index for epoch in range(1, 8) for draw in draws(sampler, epoch))
    assert set(counts.values()) == {8}
    assert len({draw.seed for epoch in range(1, 8) for draw in draws(sampler, epoch)}) == 56


def test_draws_follow_from_seed_and_epoch():
    first, again, other = (DrawSampler(10, 2, iterations=5, seed=seed) for seed in (0, 0, 1))
    assert draws(first, 3) == draws(again, 3)
    assert draws(first, 3) != draws(first, 4)
    assert draws(first, 3) != draws(other, 3)


def test_ranks_share_the_global_batches_of_one_process():
    alone = draws(DrawSampler(10, 4, iterations=3), 2)
    ranks = [draws(DrawSampler(10, 2, iterations=3, num_replicas=2, rank=rank), 2) for rank in (0, 1)]
    for iteration in range(3):
        halves = [draw for rank in ranks for draw in rank[2 * iteration : 2 * iteration + 2]]
        assert halves == alone[4 * iteration : 4 * iteration + 4]


def test_more_draws_than_cases_still_make_full_batches():
    assert len(draws(DrawSampler(num_cases=3, batch_size=8), 1)) == 8


GROUPS = [0] * 9 + [1] * 2 + [2]


def test_with_groups_all_classes_are_drawn_equally_often_and_in_each_all_cases():
    sampler = DrawSampler(12, 6, iterations=9, seed=1, groups=GROUPS)
    counts = collections.Counter(draw.index for draw in draws(sampler, 1))
    assert [counts[case] for case in range(12)] == [2] * 9 + [9, 9, 18]
    for first in range(0, 54, 3):  # in turn
        assert {GROUPS[draw.index] for draw in draws(sampler, 1)[first : first + 3]} == {0, 1, 2}
    assert len({draw.seed for draw in draws(sampler, 1)}) == 54


def test_balanced_draws_follow_from_seed_and_epoch_go_on_in_the_middle_and_are_shared_by_ranks():
    def sampler(size=4, **settings):
        return DrawSampler(12, size, iterations=3, groups=GROUPS, **settings)

    alone = draws(sampler(), 2)
    assert alone == draws(sampler(), 2) != draws(sampler(), 3)
    assert alone != draws(sampler(seed=1), 2)
    resumed = sampler()
    resumed.skip(2)
    assert draws(resumed, 2) == alone[8:]
    halves = [draws(sampler(2, num_replicas=2, rank=rank), 2) for rank in (0, 1)]
    assert [draw for n in range(3) for half in halves for draw in half[2 * n : 2 * n + 2]] == alone
    shards = [draws(sampler(2, num_replicas=2, rank=rank, sharded=True), 2) for rank in (0, 1)]
    assert all(0 <= draw.index < 6 for shard in shards for draw in shard)  # each of its own six


def random_dataset(cache="memory", cache_dir=None):
    transform = Compose([ScaleIntensityd("image"), RandGaussianNoised("image", prob=1.0)])
    data = [{"image": torch.arange(8.0).reshape(1, 2, 2, 2) + number} for number in range(6)]
    return DrawnDataset(build_dataset(data, transform, cache, cache_dir))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_augmentation_does_not_depend_on_the_number_of_workers(num_workers):
    def epoch(workers):
        sampler = DrawSampler(6, 2, iterations=4)
        loader = torch.utils.data.DataLoader(random_dataset(), batch_size=2, sampler=sampler, num_workers=workers)
        return [torch.as_tensor(batch["image"]) for batch in loader]

    assert all(torch.equal(a, b) for a, b in zip(epoch(0), epoch(num_workers), strict=True))


class CountedRead:
    """A file-backed source that counts how often it is read."""

    reads = 0


def file_dataset(folder, cache, cache_dir=None):
    from monai.transforms import Lambdad

    def read(path):
        CountedRead.reads += 1
        return torch.as_tensor(np.load(path))

    for number in range(2):
        if not (folder / f"{number}.npy").exists():
            np.save(folder / f"{number}.npy", np.full((1, 2, 2, 2), number, np.float32))
    data = [{"image": str(folder / f"{number}.npy"), "case": str(number)} for number in range(2)]
    transform = Compose([Lambdad("image", read), RandGaussianNoised("image", prob=1.0)])
    return build_dataset(data, transform, cache, cache_dir)


def test_a_memory_cache_reads_each_file_once(tmp_path):
    CountedRead.reads = 0
    dataset = file_dataset(tmp_path, "memory")
    for _ in range(3):
        dataset[0], dataset[1]
    assert CountedRead.reads == 2


def test_a_changed_file_is_not_answered_from_the_disk_cache(tmp_path):
    from monai.transforms import Compose, Identityd, LoadImaged

    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.float32))
    data = [{"image": str(tmp_path / "a.npy")}]
    transform = Compose([LoadImaged("image"), Identityd("image")])
    dataset = build_dataset(data, transform, "disk", tmp_path / "cache")
    assert dataset[0]["image"].sum() == 0
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 1
    np.save(tmp_path / "a.npy", np.ones((5, 5), np.float32))
    assert dataset[0]["image"].sum() == 25


def test_a_disk_cache_serves_every_run_on_the_same_files(tmp_path):
    from monai.transforms import Identityd, LoadImaged

    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.float32))
    for seed in (0, 1):
        data = [{"image": str(tmp_path / "a.npy"), "case": "a", "label": f"label_{seed}"}]
        dataset = build_dataset(data, Compose([LoadImaged("image"), Identityd("image")]), "disk", tmp_path / "cache")
        assert dataset[0]["image"].sum() == 0
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 1


def test_a_change_in_any_file_of_a_case_is_prepared_afresh(tmp_path):
    files = [tmp_path / "t1.npy", tmp_path / "t2.npy"]
    for file in files:
        np.save(file, np.zeros(3))
    item = {"image": [str(file) for file in files], "case": "a"}
    before = {
        _hash_file(item),
        _hash_file(item | {"image": item["image"][:1]}),
        _hash_file({**item, "image": item["image"][::-1]}),
    }
    np.save(files[1], np.zeros(5))
    assert len({*before, _hash_file(item)}) == 4


def test_a_cache_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"cache 'tape' must be one of \('memory', 'disk', 'none'\)"):
        build_dataset([], Compose([]), "tape")
    with pytest.raises(ValueError, match="cache 'disk' needs a cache_dir"):
        build_dataset([], Compose([]), "disk")


def test_a_damaged_file_of_the_disk_cache_is_prepared_again(tmp_path, caplog):
    def prepared():
        data = [{"image": str(tmp_path / "volume.nii.gz"), "case": "volume"}]
        return build_dataset(data, Compose([Lambdad("image", _ramp)]), "disk", tmp_path)[0]

    (tmp_path / "volume.nii.gz").write_bytes(b"")
    first = prepared()
    (file,) = tmp_path.glob("*.pt")
    for damaged in (file.read_bytes()[:100], b""):
        file.write_bytes(damaged)
        assert torch.equal(prepared()["image"], first["image"])
        assert "this volume is prepared again" in caplog.text
        caplog.clear()
    assert torch.equal(prepared()["image"], first["image"])
    assert not caplog.text


def test_parallel_writers_of_the_disk_cache_do_not_disturb_each_other(tmp_path):
    writers = [FORKS.Process(target=fill, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(480)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 8  # whole files, and nothing beside them
    fill(tmp_path)


def fill(folder):
    """Read eight volumes through a disk cache, again and again, and check them."""
    folder = Path(folder)
    data = [{"image": str(folder / f"{number}.nii.gz"), "number": number} for number in range(8)]
    for item in data:
        Path(item["image"]).touch()
        os.utime(item["image"], (0, 0))
    transform = Compose([Lambdad("image", _ramp)])
    for _ in range(5):
        for item in build_dataset(data, transform, "disk", folder / "cache"):
            assert torch.equal(item["image"], torch.arange(100_000.0))


def _ramp(_):
    return torch.arange(100_000.0)


@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_draws_leave_what_the_cache_keeps_as_it_was(modality, tmp_path):
    for number in range(3):
        write_volume(tmp_path / "scans" / f"{number}.nii.gz", seed=number, low=-1000.0 if modality == "ct" else 0.0)
    knobs = TINY_KNOBS | {
        "dataset_dir": str(tmp_path / "scans"),
        "output_dir": str(tmp_path / "out"),
        "modality": modality,
        "num_workers": 0,
        "affine_prob": 0.5,
        "flip_prob": 1.0,
        "hu_warp_prob": 1.0,
        "ct_noise_prob": 1.0,
        "iterations_per_epoch": 8,
    }
    workflow = started(**knobs)
    cache = workflow.parser.get_parsed_content("train::dataset")._cache
    before = [item["image"].clone() for item in cache]
    for batch in workflow.parser.get_parsed_content("train::dataloader"):
        batch["image"].zero_()  # what is handed out is a copy
    assert all(torch.equal(item["image"], image) for item, image in zip(cache, before, strict=True))


def test_a_changed_label_is_not_answered_from_the_disk_cache(tmp_path):
    (tmp_path / "image").write_text("image")
    names = set()
    for text in ("one", "other label"):
        (tmp_path / "label").write_text(text)
        names.add(_hash_file({"image": str(tmp_path / "image"), "label": str(tmp_path / "label"), "case": "a"}))
    assert len(names) == 2


def test_a_worker_puts_turned_and_unturned_volumes_with_their_masks_into_one_batch(cohort, tmp_path):
    knobs = TINY_KNOBS | {"batch_size": 6, "iterations_per_epoch": 2, "num_workers": 1, "affine_prob": 0.5}
    workflow = started(**knobs, dataset_dir=str(cohort), output_dir=str(tmp_path), field_of_view="foreground")
    batches = list(workflow.parser.get_parsed_content("train::dataloader"))
    assert [batch["fov"].dtype for batch in batches] == [torch.uint8] * 2
