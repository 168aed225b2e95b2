"""Federated pre-training: a site, as a server of MONAI's or NVFlare's kind drives it."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from torch import Tensor

from ..mistakes import Mistake
from ..weights import bundle_root

__all__ = ["average_updates", "federated_site"]


def federated_site(
    config_file: str | Sequence[str], rounds: int, local_epochs: int = 1, name: str = "site", **knobs: Any
) -> MonaiAlgo:
    """Build one site of a federated pre-training, ready to ``evaluate``, ``train`` and ``get_weights``.

    The schedule goes over all rounds. What leaves the site are differences of weights, counters and metrics; volumes,
    their names, the index, the cache and checkpoints stay in the site's folders.

    Args:
        config_file: of the bundle or the site's own, as for ``run training``.
        rounds: of the whole federation.
        local_epochs: epochs of training in a round.
        name: of the site, in the log.
        knobs: the site's: ``dataset_dir``, an ``output_dir`` of its own, …

    Raises:
        Mistake: for a knob that follows from the rounds; as the cause of MONAI's error, for all that ``run training``
            refuses.
    """
    if fixed := knobs.keys() & {"max_epochs", "early_stop_patience", "resume"}:
        raise Mistake(f"{min(fixed)} cannot be chosen for a site: all sites train {local_epochs} epochs a round")
    epochs = rounds * local_epochs
    files = [config_file] if isinstance(config_file, str | Path) else list(config_file)
    # Validation follows at the end of each round; an interval of all epochs adds none in between.
    schedule = {"max_epochs": epochs, "early_stop_patience": epochs, "val_interval": epochs}
    schedule["lr_scheduler::t_total"] = "$@max_epochs * @steps_per_epoch"  # the trainer's own is one round's
    sys.path.insert(1, str(bundle_root()))  # as a run does: the configs name `scripts`
    workflow = ConfigWorkflow(files, logging_file=False, run_id="training", **(schedule | knobs))
    workflow.initialize()
    for step in range(len(workflow.parser["training"]) - 1):  # the checks of a run; the server asks for the training
        workflow.parser.get_parsed_content(f"training::{step}")
        workflow.parser.ref_resolver.remove_resolved_content(f"training::{step}")
    site = MonaiAlgo(str(bundle_root()), local_epochs, train_workflow=workflow, eval_workflow=workflow)
    site.initialize({ExtraItems.CLIENT_NAME: name})
    return site


def average_updates(
    weights: Mapping[str, Tensor], updates: Iterable[Mapping[str, Tensor]], shares: Sequence[float]
) -> dict[str, Tensor]:
    """Average the sites' differences and add them to the weights of all: FedAvg.

    Args:
        weights: that the sites started the round from.
        updates: of each site, its weights minus those.
        shares: of each site, such as its volumes or steps, in the same order.
    """
    new = {name: value.clone() for name, value in weights.items()}
    for update, share in zip(updates, torch.tensor(shares) / sum(shares), strict=True):
        for name, difference in update.items():
            new[name] += (share * difference).to(new[name].device)  # MONAI hands differences over on the CPU
    return new
