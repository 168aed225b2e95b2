"""Which volumes weights have seen: salted hashes of the voxels, in the JSON beside the weights."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .describing import Case
from .index import Index

__all__ = ["provenance", "warn_of_seen"]

logger = logging.getLogger(__name__)


def provenance(cases: Sequence[Case], index: Index, pretrained: str | Path | None = None) -> dict[str, Any]:
    """Tell what weights have seen that are trained on some cases, and what those they start from have seen.

    Returns:
        What is written beside the weights: ``seen``, a ``salt`` and a hash of each volume. They tell whether somebody
        who has a volume may test on it, and nothing to those who have not.
    """
    hashes = {facts["hash"] for facts in index.describe(cases)}
    before = _seen(pretrained)
    salt = before["salt"] or hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()[:16]
    return {"seen": {"salt": salt, "hashes": sorted({*before["hashes"], *(_salted(one, salt) for one in hashes)})}}


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
    record = None if weights is None else Path(weights).with_suffix(".json")
    content = json.loads(record.read_text(encoding="utf-8")) if record is not None and record.is_file() else {}
    seen = content.get("seen") if isinstance(content, dict) else None  # it may be another tool's
    return {"salt": "", "hashes": []} | (seen if isinstance(seen, dict) else {})


def _salted(content: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}{content}".encode()).hexdigest()[:16]
