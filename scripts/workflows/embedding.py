"""A pre-trained encoder that carries its preprocessing: from a file of weights to the features of scans, in Python."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import Compose
from torch import Tensor, nn

from ..data import list_cases
from ..knobs import is_knob, read
from ..mistakes import Mistake, likely, reason
from ..weights import bundle_root, carried_knobs, read_record, recorded
from .features import ExtractFeatures

__all__ = ["Embedding", "PretrainedEncoder", "from_pretrained"]

logger = logging.getLogger(__name__)

# In the folder of a bundle, of a repository, or of a run.
FILES = [
    f"{folder}{name}"
    for folder in ("", "models/", "checkpoints/")
    for name in ("encoder.safetensors", "model.safetensors", "encoder.pt", "model.pt")
]
PATTERNS = [*FILES, *("model.json", "encoder.json", "models/*.json", "checkpoints/*.json")]


class Embedding(NamedTuple):
    """What an encoder makes of a scan."""

    case: str  # its name, or its path below the folder, without suffix
    embedding: Tensor  # (C,), the mean of the features, weighted by the share of foreground in each patch
    features: MetaTensor  # (C, d, h, w), whose affine puts each token at its place in the scanner's space, mm in RAS


class PretrainedEncoder(nn.Module):
    """An encoder with the preprocessing that it was trained with; :func:`from_pretrained` makes it.

    Args:
        encoder: maps volumes ``(B, in_chans, *img_size)``, prepared, to features ``(B, C, D/P, H/P, W/P)``.
        transform: from ``{"image": path}`` to ``image`` ``(C, D, H, W)`` of any size, prepared.
        inferer: slides the encoder over a volume.
        extract: from a prepared volume to its features.
        record: what the weights carry.
    """

    def __init__(
        self,
        encoder: nn.Module,
        transform: Compose,
        inferer: Inferer,
        extract: ExtractFeatures,
        record: dict[str, Any],
    ) -> None:
        super().__init__()
        self.encoder, self.transform, self.inferer, self.extract = encoder, transform, inferer, extract
        self.record = record

    def forward(self, volume: Tensor) -> Tensor:
        """Run the encoder alone."""
        return self.encoder(volume)

    def embed(self, scan: str | Path | Sequence[str | Path]) -> Embedding:
        """Embed one scan of any size: a file, a folder of one DICOM series, or a list of files, its channels.

        Raises:
            Mistake: when it cannot be used, or does not fit what the encoder was trained on; the message says why.
        """
        if isinstance(scan, str | Path):
            cases = list_cases(scan)
            if len(cases) > 1:
                raise Mistake(f"{scan} holds {len(cases)} scans: embed_folder takes them all")
            return self._embed(cases[0])
        return self._embed({"case": Path(scan[0]).name.split(".")[0], "image": [str(file) for file in scan]})

    def embed_folder(self, folder: str | Path) -> Iterator[Embedding]:
        """Embed the scans of a folder, or of anything else that training reads, one by one.

        A scan that cannot be used does not stop the others: a warning names it.

        Raises:
            Mistake: when there is none, or none that can be used.
        """
        cases, failed = list_cases(folder), []
        for case in cases:
            answer = self._forgiving(case, failed)
            if answer is not None:
                yield answer
        if len(failed) == len(cases):
            raise Mistake(f"none of the {len(cases)} scans in {folder} can be used, the first one, {failed[0]}")

    def _forgiving(self, case: dict[str, Any], failed: list[str]) -> Embedding | None:
        try:
            return self._embed(case)
        except Exception as error:  # out of memory on one scan must not cost the others
            failed.append(f"{case['case']}: {reason(error)}")
            logger.warning("no features of %s", failed[-1])
            return None

    def _embed(self, case: dict[str, Any]) -> Embedding:
        try:
            item = self.transform(case)
        except RuntimeError as error:
            raise Mistake(reason(error)) from error
        inferer = self.inferer.to(next(self.encoder.parameters()).device)  # where its user has put it
        answer = self.extract(SimpleNamespace(network=self.encoder, inferer=inferer), item)
        return Embedding(case["case"], answer["embedding"], answer["maps"]["features"])


def from_pretrained(source: str | Path | None = None, **knobs: Any) -> PretrainedEncoder:
    """Load an encoder together with its preprocessing, as its weights carry them.

    Args:
        source: a file of weights, ``.pt`` or ``.safetensors``; the folder of a run or a bundle; or ``owner/name`` on
            Hugging Face, where no such folder is there. Default: the weights that come with the bundle.
        knobs: of ``configs/inference.json``, such as ``device`` or ``overlap``, and what the weights do not carry.

    Raises:
        Mistake: when there is no such thing; when it carries too little and the knobs do not say the rest; or when a
            knob contradicts it.
    """
    weights = _find(source)
    own = ConfigParser.load_config_file(bundle_root() / "configs" / "inference.json")
    names = [name for name, value in own.items() if is_knob(name, value)]
    if wrong := [name for name in knobs if name not in names]:
        raise Mistake(f"there is no knob called {wrong[0]}{likely(wrong[0], names) or f': they are {names}'}")
    knobs = {name: read(name, value if name != "device" else str(value), own[name]) for name, value in knobs.items()}
    record = read_record(weights)
    known = {*knobs, *recorded(record, "network"), *recorded(record, "preprocessing")}
    needed = names[names.index("img_size") : names.index("stem_base_dim") + 1]
    if lacking := [name for name in ("modality", "spacing", *needed) if name not in known]:
        raise Mistake(
            f"{weights} carries no {', '.join(lacking)}: copy the JSON that its training wrote beside it, too, or give "
            "them by name"
        )
    config = own | knobs
    config |= carried_knobs(weights, config, own, knobs)
    # Of the simulated sample, which stands for no dataset, an inference takes any spacing: here there are scans.
    config |= {"bundle_root": str(bundle_root()), "pretrained": str(weights), "dataset_dir": "scans"}
    package = __package__.rpartition(".")[0]  # the config calls it scripts; it may be installed as bertswin_mae
    parser = ConfigParser(json.loads(json.dumps(config).replace('"scripts.', f'"{package}.')))
    parts = ("network", "preprocessing", "inferer", "evaluator::iteration_update")
    encoder, *others = (parser.get_parsed_content(part) for part in parts)
    return PretrainedEncoder(encoder.eval(), *others, record).eval()


def _find(source: str | Path | None) -> Path:
    """Find the file of weights."""
    place = bundle_root() if source is None else Path(source).expanduser()
    if place.is_file():
        return place
    folder = place if place.exists() else _download(str(source))
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise Mistake(f"{source} holds no weights: none of {', '.join(FILES)}")
    return found[0]


def _download(repo: str) -> Path:
    """Fetch the weights of a repository on Hugging Face, and what they carry, or find them where they were fetched."""
    is_path = repo.startswith(("/", ".", "~")) or repo.endswith((".pt", ".safetensors"))
    if repo.count("/") != 1 or is_path or Path(repo).parent.exists():
        raise Mistake(f"there is no file or folder {repo}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise Mistake(
            f"there is no file or folder {repo}; if it is on Hugging Face, pip install huggingface_hub first"
        ) from error
    logger.warning("there is no file or folder %s: looking on Hugging Face", repo)
    try:
        return Path(snapshot_download(repo, allow_patterns=PATTERNS))
    except Exception as error:  # of the network, of the hub, of the name
        raise Mistake(
            f"{repo} is no file or folder here, and Hugging Face does not give it ({reason(error)}): check the name "
            "and the connection. Without one, what was fetched before is used, and any folder"
        ) from error
