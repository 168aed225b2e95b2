"""What one workflow alone needs, a file each."""

from .features import (
    FeatureEvaluator,
    FeatureWriter,
    Placement,
    feature_affine,
    place_in_window,
    principal_colours,
    save_nifti,
)
from .probe import (
    FrozenProbe,
    accuracy,
    fit_neighbours,
    fit_ridge,
    label_fractions,
    load_frozen,
    probe_embeddings,
    r_squared,
)
from .segmentation import FreezeEncoder, MaskWriter, build_encoder, fill_encoder, from_scratch, parameter_groups
from .stem_tuning import StemTuning, StemTuningLoss, StemTuningReport, load_original

__all__ = [
    "FeatureEvaluator",
    "FeatureWriter",
    "FreezeEncoder",
    "FrozenProbe",
    "MaskWriter",
    "Placement",
    "StemTuning",
    "StemTuningLoss",
    "StemTuningReport",
    "accuracy",
    "build_encoder",
    "feature_affine",
    "fill_encoder",
    "fit_neighbours",
    "fit_ridge",
    "from_scratch",
    "label_fractions",
    "load_frozen",
    "load_original",
    "parameter_groups",
    "place_in_window",
    "principal_colours",
    "probe_embeddings",
    "r_squared",
    "save_nifti",
]
