"""Promises of compact volumes: half of the memory, the same to the bit, and refused where that cannot be."""

import numpy as np
import pytest
import torch
from monai.transforms import BorderPadd, Compose, RandSpatialCropd, ScaleIntensityRangePercentilesd

from scripts.mistakes import Mistake
from scripts.transforms import Compactd, Expandd


def scan(shape=(20, 18, 16), seed=0):
    whole = np.random.default_rng(seed).integers(-1024, 3000, (2, *shape))
    data = {"image": torch.from_numpy(whole.astype(np.float32)), "case": "scan"}
    return ScaleIntensityRangePercentilesd("image", 1, 99, -1, 1, clip=True)(data)


def test_what_a_scanner_stores_is_kept_in_half_of_the_memory_to_the_bit():
    data = scan()
    kept = Compactd("image")(data)
    assert kept["image"].dtype == torch.int16
    expanded = Expandd(["image", "image_values"], allow_missing_keys=True)(kept)
    assert torch.equal(expanded["image"], torch.as_tensor(data["image"]))
    assert expanded.keys() == data.keys()


def test_crops_and_pads_of_codes_are_those_of_the_volume():
    steps = [BorderPadd("image", 3, value=-1.0), RandSpatialCropd("image", (9, 9, 9), random_size=False)]
    plain = Compose(steps).set_random_state(seed=3)(scan())["image"]
    keys = {"keys": ["image", "image_values"], "allow_missing_keys": True}
    compact = Compose([steps[0], Compactd("image"), steps[1], Expandd(**keys)]).set_random_state(seed=3)(scan())[
        "image"
    ]
    assert torch.equal(torch.as_tensor(compact), torch.as_tensor(plain))


def test_a_batch_is_expanded_volume_by_volume_each_with_its_own_values():
    cases = [Compactd("image")(scan(seed=seed)) for seed in range(3)]
    batch = {key: torch.stack([torch.as_tensor(case[key]) for case in cases]) for key in ("image", "image_values")}
    expanded = Expandd(["image", "image_values"]).change(batch, [None] * 3)["image"]
    assert torch.equal(expanded, torch.stack([torch.as_tensor(scan(seed=seed)["image"]) for seed in range(3)]))


def test_a_volume_of_too_many_values_is_refused_by_name():
    data = {"image": torch.rand(1, 50, 50, 50, generator=torch.Generator().manual_seed(0)), "case": "resampled"}
    with pytest.raises(Mistake, match=r"^resampled has \d+ different values where compact has codes for 65536: was it"):
        Compactd("image")(data)
