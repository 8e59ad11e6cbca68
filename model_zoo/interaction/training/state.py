"""What a training run keeps on disk between steps: weights, their average, the optimiser's moments, the step.

One safetensors file a stage, written under a temporary name and renamed, so that a run that is killed at any moment
goes on from the last whole one. No random state is kept: every draw of a step is keyed by (seed, stage, step).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tmlc.errors import CheckpointError

FORMAT = "1"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""


class TrainState:
    """The trained tensors of one stage, an exponential average of them, and AdamW over the parameters among them.

    Attributes:
        step: steps done.
        seconds: spent on them.
        tensors: name → the model's own parameter or buffer, changed in place.
        average: name → its exponential average, what is evaluated and exported.
    """

    def __init__(self, tensors: Mapping[str, Tensor], weight_decay: float, betas: tuple[float, float]) -> None:
        self.step, self.seconds = 0, 0.0
        self.tensors = dict(tensors)
        self.average = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        decayed = [t for n, t in self.tensors.items() if isinstance(t, nn.Parameter) and _decays(n, t)]
        plain = [t for n, t in self.tensors.items() if isinstance(t, nn.Parameter) and not _decays(n, t)]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, fused=True)

    @torch.no_grad()
    def update(self, rate: float, clip: float, decay: float) -> float:
        """One step of the optimiser and of the average, from the gradients that are there; returns their norm."""
        parameters = [t for t in self.tensors.values() if isinstance(t, nn.Parameter)]
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [t.detach() for t in self.tensors.values()], 1 - keep)
        return float(norm)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages in the place of the weights, for as long as it lasts."""
        kept = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.use_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    tensor.copy_(kept[name])

    @torch.no_grad()
    def use_average(self) -> None:
        """Puts the averages in the place of the weights: what comes after a stage is built on them."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self.average[name])

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Writes the state; `settings` are kept beside it in the file's header."""
        out: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            out[f"weights.{name}"] = tensor.detach()
            out[f"average.{name}"] = self.average[name]
            for key, value in self.optimiser.state.get(tensor, {}).items():
                out[f"{key}.{name}"] = value
        header = {"format": FORMAT, "step": str(self.step), "seconds": repr(self.seconds)}
        partial = path.with_name(f".{path.name}.partial")
        save_file({k: v.contiguous() for k, v in out.items()}, partial, {**header, "settings": json.dumps(settings)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Goes back to a saved state.

        Raises:
            CheckpointError: the file is damaged, or of another model.
        """
        header, saved = read(path)
        for name, tensor in self.tensors.items():
            for kind, target in (("weights", tensor), ("average", self.average[name])):
                value = saved.get(f"{kind}.{name}")
                if value is None or value.shape != target.shape:
                    raise CheckpointError(
                        f"{kind} of {name} are missing or of another shape", where=str(path),
                        fix="continue a run with the configuration that it was begun with",
                    )  # fmt: skip
                target.copy_(value)
            moments = {key: saved[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in saved}
            if moments:
                self.optimiser.state[tensor] = {key: value.to(tensor.device) for key, value in moments.items()}
        self.step, self.seconds = int(header["step"]), float(header["seconds"])


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(header, tensors) of a saved state.

    Raises:
        CheckpointError: the file is damaged or of a newer form.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError("not a training state of this version", where=str(path), fix="begin a new run")
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the training state cannot be read: {error}", where=str(path),
                              fix="begin a new run, or restore the file") from error  # fmt: skip


def _decays(name: str, tensor: Tensor) -> bool:
    """Matrices decay; norms, gains, biases, convolutions and tables of embeddings do not."""
    return tensor.ndim >= 2 and not any(part in name for part in ("conv", "embed", "times", "self_voice", "rel_logits"))
