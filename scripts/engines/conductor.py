"""GradientConductor: one gradient a loss, merged without conflict, smoothed and applied."""

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812

from ..losses import MaskedLoss
from ..mistakes import Mistake
from .trainer import MAETrainer

__all__ = ["ConductorTrainer", "GradientConductor"]

SMALL = 1e-8  # norms below this are taken for zero


class GradientConductor(torch.optim.Optimizer):
    """Merge the gradients of several losses, resolving their conflicts in pairs (paper, GradientConductor).

    In the training loop, compute one gradient for each loss (task), accumulated over its micro-batches and unscaled;
    then :meth:`merge` them, clip if need be, and :meth:`step`. Gradients are kept in float32 throughout.

    A pair of tasks is in conflict when the cosine of their gradients is below ``weak``. The arbiter lets that one win
    which agrees more with its own previous gradient and is large for its own history; the loser gives up its component
    along the winner, and in smooth mode, where conflicts are mild, the winner gives up some of its own as well.

    Args:
        params: parameters; one group.
        lr: rate; in sign mode relative to the norm of each tensor.
        momentum: of the moving average of the merged gradient, corrected for its start at zero.
        mode: how much is given up depends on the cosine (``smooth``) or on the zone it lies in (``zone``).
        sign: update by the sign of the average times the trust ratio of each tensor (parameter norm over gradient
            norm); otherwise by the average itself.
        trust_clip: largest trust ratio.
        thresholds: cosines that separate the zones: critical, main, weak.
        remap_power: in smooth mode, the power that bends the angle between critical and main.
        arbiter_weights: of the agreement with the own past, and of the share of the two norms.
        norm_decay: of each task's moving average of its norm, which starts at one.
        max_iterations: pairs to resolve in one call.
        dominance_window: a task that won that many arbitrations in a row yields the next one; 0: never.
        weight_decay: decoupled, times ``lr``.

    Raises:
        Mistake: for settings out of range, or several groups of parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1.5e-5,
        momentum: float = 0.9,
        mode: str = "smooth",
        sign: bool = True,
        trust_clip: float = 10.0,
        thresholds: Sequence[float] = (-0.8, -0.5, 0.0),
        remap_power: float = 2.0,
        arbiter_weights: Sequence[float] = (0.8, 0.2),
        norm_decay: float = 0.95,
        max_iterations: int = 3,
        dominance_window: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        if mode not in ("smooth", "zone"):
            raise Mistake(f"mode {mode!r} must be 'smooth' or 'zone'")
        if not -1 <= thresholds[0] < thresholds[1] < thresholds[2] <= 1:
            raise Mistake(f"thresholds {tuple(thresholds)} must rise within [-1, 1], for example (-0.8, -0.5, 0.0)")
        for name, value in {"momentum": momentum, "norm_decay": norm_decay}.items():
            if not 0 <= value < 1:
                raise Mistake(f"{name} {value} must lie in [0, 1), for example 0.9")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if len(self.param_groups) != 1:
            raise Mistake(f"GradientConductor takes one group of parameters, not {len(self.param_groups)}")
        self.momentum, self.mode, self.sign, self.trust_clip = momentum, mode, sign, trust_clip
        self.critical, self.main, self.weak = thresholds
        self.remap_power, self.arbiter_weights, self.norm_decay = remap_power, tuple(arbiter_weights), norm_decay
        self.max_iterations, self.dominance_window = max_iterations, dominance_window
        self.steps = 0
        self.norm_averages: dict[str, float] = {}
        self.previous: dict[str, Tensor] = {}
        self.recent_winners: deque[str] = deque(maxlen=max(1, dominance_window))
        self.statistics: dict[str, Any] = {}  # of the last merge

    @torch.no_grad()
    def merge(self, task_gradients: Mapping[str, Sequence[Tensor | None]]) -> list[Tensor]:
        """Merge one gradient a task into ``.grad`` of the parameters.

        Each task's gradient is averaged over the ranks first, so that all judge the same conflicts and decide alike.

        Args:
            task_gradients: of this rank's own batch, for each task a list in the order of the parameters; None stands
                for zeros.

        Returns:
            What is set as ``.grad``, but float32.

        Raises:
            ValueError: when a list does not match the parameters.
        """
        parameters = self.param_groups[0]["params"]
        tasks = {name: _flatten(name, gradients, parameters) for name, gradients in task_gradients.items()}
        if (ranks := idist.get_world_size()) > 1:
            tasks = {name: idist.all_reduce(gradient).div_(ranks) for name, gradient in tasks.items()}
        norms = {name: gradient.norm().item() for name, gradient in tasks.items()}
        for name, norm in norms.items():
            before = self.norm_averages.get(name, 1.0)
            self.norm_averages[name] = self.norm_decay * before + (1 - self.norm_decay) * norm
        cosines = _pair_cosines(tasks)
        # Norms and cosines before the merge; of the conflicts that it resolves pair and cosine, and who won.
        self.statistics = {"norms": norms, "cosines": cosines, "conflicts": [], "winners": []}
        for settled in range(self.max_iterations):
            cosines = _pair_cosines(tasks) if settled else cosines
            worst = min(cosines, key=cosines.__getitem__, default=None)
            if worst is None or cosines[worst] >= self.weak:
                break
            self._resolve(tasks, *worst, cosines[worst])
        merged = torch.stack(list(tasks.values())).sum(dim=0)
        self.previous = tasks
        # The reference adds the other tasks up in the first one's buffer, so that this is what it remembers of the
        # first task. Kept: its published figures, and the tensors that this class is tested against, depend on it.
        self.previous[next(iter(tasks))] = merged.clone()
        parts = merged.split([parameter.numel() for parameter in parameters])
        gradients = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        return gradients

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply one update from ``.grad``: ``p ← p − update``."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.steps += 1
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["average"] = torch.zeros_like(parameter, dtype=torch.float32)
            average = state["average"].lerp_(parameter.grad.float(), 1 - self.momentum)
            update = average / (1 - self.momentum**self.steps)
            if self.sign:
                update = update.sign() * _trust_ratio(parameter, update, self.trust_clip)
            if group["weight_decay"]:
                update = update + group["weight_decay"] * parameter
            parameter.sub_(group["lr"] * update)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next merge and step depend on, as tensors and plain values."""
        conductor = {"steps": self.steps, "norm_averages": dict(self.norm_averages), "previous": dict(self.previous)}
        return super().state_dict() | {"conductor": conductor | {"recent_winners": list(self.recent_winners)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        conductor = state_dict["conductor"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "conductor"})
        device = self.param_groups[0]["params"][0].device
        self.steps, self.norm_averages = conductor["steps"], dict(conductor["norm_averages"])
        self.previous = {name: gradient.to(device) for name, gradient in conductor["previous"].items()}
        self.recent_winners = deque(conductor["recent_winners"], maxlen=self.recent_winners.maxlen)
        for state in self.state.values():
            state["average"] = state["average"].float()  # torch casts it to the parameter's type

    def _resolve(self, tasks: dict[str, Tensor], first: str, second: str, cosine: float) -> None:
        """Settle the conflict of a pair: change its gradients in ``tasks``."""
        winner, loser = self._arbitrate(tasks, first, second)
        self.statistics["conflicts"].append((first, second, cosine))
        self.statistics["winners"].append(winner)
        give_winner, give_loser = self._concessions(cosine)
        won, lost = tasks[winner], tasks[loser]
        product = torch.dot(won, lost)
        tasks[winner] = won - give_winner * product / (lost.square().sum() + SMALL) * lost
        if self.mode == "zone" and cosine < self.critical:
            tasks[loser] = torch.zeros_like(lost)
        else:
            tasks[loser] = lost - give_loser * product / (won.square().sum() + SMALL) * won

    def _arbitrate(self, tasks: dict[str, Tensor], first: str, second: str) -> tuple[str, str]:
        """Return winner and loser of a pair."""
        sizes = {name: (tasks[name].norm() / self.norm_averages[name]).item() for name in (first, second)}

        def score(name: str) -> float:
            agreement = max(0.0, _cosine(tasks[name], self.previous[name])) if name in self.previous else 0.0
            share = sizes[name] / max(sum(sizes.values()), SMALL)
            return self.arbiter_weights[0] * agreement + self.arbiter_weights[1] * share

        winner, loser = (first, second) if score(first) >= score(second) else (second, first)
        if self.dominance_window and list(self.recent_winners) == [winner] * self.dominance_window:
            winner, loser = loser, winner
        self.recent_winners.append(winner)
        return winner, loser

    def _concessions(self, cosine: float) -> tuple[float, float]:
        """Say what share of their projections on each other winner and loser give up."""
        if self.mode == "zone":
            return (1.0, 1.0) if cosine >= self.main else (0.0, 1.0)
        if cosine >= self.main:
            angle = math.pi / 2 * (1 - (cosine - self.main) / (self.weak - self.main))
        elif cosine >= self.critical:
            depth = (cosine - self.main) / (self.critical - self.main)
            angle = math.pi / 2 * (1 + depth**self.remap_power)
        else:
            angle = math.pi
        return math.sin(angle), math.sin(min(angle, math.pi / 2))


def _flatten(name: str, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    if len(gradients) != len(parameters):
        raise ValueError(f"task {name!r} has {len(gradients)} gradients for {len(parameters)} parameters")
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(own) if part is None else part).float().flatten() for part, own in pairs])


def _trust_ratio(parameter: Tensor, update: Tensor, most: float) -> Tensor:
    norm, size = parameter.float().norm(), update.norm()
    usable = (norm > SMALL) & (size > SMALL)
    return torch.where(usable, (norm / size.clamp(min=SMALL)).clamp(max=most), torch.ones_like(norm))


def _pair_cosines(tasks: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    return {(a, b): _cosine(tasks[a], tasks[b]) for a, b in itertools.combinations(tasks, 2)}


def _cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a, b, dim=0, eps=SMALL).item()


class ConductorTrainer(MAETrainer):
    """The trainer that drives a GradientConductor: one gradient a task of the loss, merged, clipped and applied.

    Args:
        kwargs: of :class:`MAETrainer`, whose ``optimizer`` is a :class:`GradientConductor`.

    Raises:
        Mistake: for a loss without tasks, a network that is divided among the ranks, or half precision.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Each task goes back through the same graph: what is compiled must not give its buffers away.
        torch._functorch.config.donated_buffer = False
        if not isinstance(self.loss_function, MaskedLoss):
            raise Mistake("the conductor takes the losses of pre-training: train_conductor.yaml goes with train.yaml")
        if any(isinstance(parameter, DTensor) for parameter in self.network.parameters()):
            raise Mistake("the conductor weighs whole gradients: it goes with --parallel ddp, not fsdp")
        if self.grad_scaler.is_enabled():
            raise Mistake("the conductor weighs gradients, which fp16 scales: choose --precision bf16 or fp32")

    def _synchronising(self, is_last: bool) -> contextlib.AbstractContextManager:
        return super()._synchronising(is_last=False)

    def _start_gradient(self) -> None:
        self.task_gradients: dict[str, list[Tensor]] = {}

    def _score(self, prediction: Any, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, components = super()._score(prediction, target)
        self.task_losses = self.loss_function.tasks(components)
        return loss, components

    def _backward(self, loss: Tensor) -> None:
        parameters = self.optimizer.param_groups[0]["params"]
        last = [*self.task_losses][-1]
        for task, part in self.task_losses.items():
            # `grad` leaves `.grad` alone, and with it the hooks by which DistributedDataParallel would average: the
            # conductor averages each task over the ranks itself, before it judges.
            gradients = torch.autograd.grad(part / self.accumulation_steps, parameters, retain_graph=task != last)
            so_far = self.task_gradients.get(task, [0.0] * len(parameters))
            self.task_gradients[task] = [sums + new.float() for sums, new in zip(so_far, gradients, strict=True)]

    def _step(self) -> None:
        self.optimizer.merge(self.task_gradients)
        super()._step()
