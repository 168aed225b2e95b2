"""From a folder of scans to draws: cases, checks, caches."""

from .caches import DiskCacheDataset, ForgivingDataset, build_dataset
from .cases import case_seed, find_cases, labelled, list_cases, split_cases
from .checks import check_cases, check_labels, resampled_shape, volume_problem, voxel_problem
from .cohort import prepare_cases
from .draws import Draw, DrawnDataset, DrawSampler
from .sample import simulated_brains

__all__ = [
    "DiskCacheDataset",
    "Draw",
    "DrawSampler",
    "DrawnDataset",
    "ForgivingDataset",
    "build_dataset",
    "case_seed",
    "check_cases",
    "check_labels",
    "find_cases",
    "labelled",
    "list_cases",
    "prepare_cases",
    "resampled_shape",
    "simulated_brains",
    "split_cases",
    "volume_problem",
    "voxel_problem",
]
