"""Loading volumes and label maps, and refusing those that cannot be used, with the reason."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from ..data.checks import MOST_VOXELS, case_problem
from ..data.describing import describe_image
from ..data.reading import read_label, read_volume
from ..mistakes import Mistake
from ..weights import usual_spacing

__all__ = ["LoadVolumed", "RefuseUnusabled"]


class LoadVolumed(MapTransform):
    """Load with :func:`~bertswin_mae.data.read_volume`: ``(C, D, H, W)`` float32, its place that of the file.

    It stands for MONAI's ``LoadImaged`` and ``EnsureChannelFirstd``, whose readers mend headers on their own. A
    ``label`` is read by :func:`~bertswin_mae.data.read_label`, onto the voxels of its image.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with paths replaced by MetaTensors, or raise a Mistake that says why one cannot be read."""
        if "lacks" in data:  # a channel, say
            raise Mistake(f"is incomplete: it lacks {data['lacks']}")
        loaded = dict(data)
        for key in self.key_iterator(data):
            loaded[key] = read_label(data[key], loaded["image"]) if key == "label" else read_volume(data[key])
        return loaded


class RefuseUnusabled(MapTransform):
    """Refuse volumes that :func:`~bertswin_mae.data.check_cases` would refuse before training; arguments as there.

    They are not 3D, constant, not finite, not in Hounsfield units for a CT, unlike what ``weights`` have seen, or would
    have more than ``max_voxels``, all channels together. Put it behind :class:`LoadVolumed`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        modality: str,
        in_chans: int = 1,
        spacing: Sequence[float] | None = None,
        max_voxels: float = MOST_VOXELS,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(keys)
        self.arguments = modality, in_chans, spacing, max_voxels, usual_spacing(weights)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data as it is, or raise a Mistake that says why a volume cannot be used."""
        for key in self.key_iterator(data):
            if problem := case_problem(data, describe_image(data[key]), *self.arguments):
                raise Mistake(problem)
        return dict(data)
