"""Where weights come from, and which volumes they have seen, as salted hashes of the voxels: part of their record."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch

from ..weights import bundle_version, read_record, recorded, sha256
from .checks import geometry_in_ras
from .describing import Case
from .index import Index

__all__ = ["licence_of", "provenance", "warn_of_seen"]

REBUILDING = ("pretraining", "conductor")  # recipes that train a decoder

logger = logging.getLogger(__name__)


def provenance(
    cases: Sequence[Case],
    index: Index,
    pretrained: str | Path | None = None,
    recipe: str = "",
    preprocessing: Mapping[str, Any] | None = None,
    loss: str | None = None,
) -> dict[str, Any]:
    """Tell what weights are trained on and how: the part of their record that is known before they are trained.

    Args:
        cases: to train on.
        index: that knows them.
        pretrained: weights to start from; what those have seen counts too.
        recipe: name of the training's.
        preprocessing: ``modality``, ``spacing``, ``intensity``, …
        loss: of a pre-training, by which its decoder learns to rebuild volumes. What follows keeps that of its weights.

    Returns:
        Plain values by name, no paths among them. ``seen`` is a ``salt`` and a hash of each volume: they tell whether
        somebody who has a volume may test on it, and nothing to those who have not.
    """
    if recipe not in REBUILDING:
        loss = recorded(read_record(pretrained), "provenance").get("loss")
    described = index.describe(cases)
    hashes = {facts["hash"] for facts in described}
    before = _seen(pretrained)
    salt = before["salt"] or hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()[:16]
    spacings = np.percentile([geometry_in_ras(facts)[1] for facts in described], [5, 50, 95], axis=0).round(3).tolist()
    usual = dict(zip(("low", "median", "high"), spacings, strict=True))
    return {
        "preprocessing": {**(preprocessing or {}), "orientation": "RAS", "cohort_spacing": usual},
        "versions": {"bertswin_mae": bundle_version(), "monai": monai.__version__, "torch": torch.__version__},
        "provenance": {
            "recipe": recipe,
            **({"loss": loss} if loss else {}),
            "date": datetime.now(tz=timezone.utc).date().isoformat(),
            "volumes": len(cases),
            "started_from_sha256": pretrained and sha256(pretrained),
            "started_from_licence": licence_of(pretrained),
        },
        "seen": {"salt": salt, "hashes": sorted({*before["hashes"], *(_salted(one, salt) for one in hashes)})},
    }


def licence_of(weights: str | Path | None) -> str | None:
    """Tell under which licence weights are, as their record says it, or that of those that they started from."""
    origin = recorded(read_record(weights), "provenance")
    return origin.get("licence") or origin.get("started_from_licence")


def warn_of_seen(cases: list[Case], index: Index, weights: str | Path | None, what: str = "validation") -> list[Case]:
    """Say how many cases some weights have seen, as far as the JSON beside them says, and return the cases."""
    seen = _seen(weights)
    if seen["hashes"]:
        known = set(seen["hashes"])
        shared = [
            case["case"]
            for case, facts in zip(cases, index.describe(cases), strict=True)
            if "hash" in facts and _salted(facts["hash"], seen["salt"]) in known
        ]
        if shared:
            names = f"{', '.join(shared[:3])}{', …' if len(shared) > 3 else ''}"
            count = f"{len(shared)} of {len(cases)} {what} volumes"
            logger.warning("%s were seen in the training of %s: %s", count, weights, names)
    return cases


def _seen(weights: str | Path | None) -> dict[str, Any]:
    return {"salt": "", "hashes": []} | recorded(read_record(weights), "seen")


def _salted(content: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}{content}".encode()).hexdigest()[:16]
