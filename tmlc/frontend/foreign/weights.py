"""Where the parameters of a transformers module are in its checkpoint, as WeightMap entries.

Modules stack the experts of a layer into one parameter, gate rows before up rows; checkpoints of Mixtral, Qwen3-MoE,
OLMoE and DeepSeek-V3 hold them one by one. Both forms are read, whichever a checkpoint has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tmlc.frontend.checkpoint import Checkpoint
from tmlc.ir.weights import WeightMap

_STACK = re.compile(r"(?P<layer>.+)\.mlp\.experts\.(?P<which>gate_up_proj|down_proj)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
#: Names of one expert's gate, up and down projection on disk.
_EXPERTS = (
    ("{layer}.mlp.experts.{e}.gate_proj.weight", "{layer}.mlp.experts.{e}.up_proj.weight",
     "{layer}.mlp.experts.{e}.down_proj.weight"),
    ("{layer}.block_sparse_moe.experts.{e}.w1.weight", "{layer}.block_sparse_moe.experts.{e}.w3.weight",
     "{layer}.block_sparse_moe.experts.{e}.w2.weight"),
)  # fmt: skip
_RENAMED = ((".mlp.gate.", ".block_sparse_moe.gate."),)


def tied_names(checkpoint: Checkpoint, model: nn.Module) -> Mapping[str, str]:
    """Parameters that may be absent from a checkpoint, and which one stands for each. Whether they are absent the
    checkpoint shows; where it has no tensors its config says so."""
    found: Mapping[str, str] = getattr(model, "_tied_weights_keys", None) or {}
    config: Any = model.config
    return found if checkpoint.has_values or config.tie_word_embeddings else {}


class ForeignWeights:
    """The weights of a module, by their names in it.

    Raises:
        CheckpointError: tensors are missing, extra or ill-shaped.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, tied: Mapping[str, str]) -> None:
        self.map, self._checkpoint = WeightMap(), checkpoint
        self._tensors = dict(model.state_dict(keep_vars=True))
        absent = [name for name in tied if name in self._tensors and name not in checkpoint.weights]
        self._tied = {name: tied[name] for name in absent}
        expected: dict[str, tuple[tuple[int, ...], bool]] = {}
        for name, tensor in self._tensors.items():
            if name not in self._tied:
                shape = tuple(tensor.shape)
                for disk in self._disk(name):
                    single = shape if isinstance(disk, str) else (shape[1] // len(disk), *shape[2:])
                    for tensor_name in (disk,) if isinstance(disk, str) else disk:
                        expected[tensor_name] = (single, tensor.is_floating_point())
        numbers = [int(layer[1]) for name in self._tensors if (layer := _LAYER.match(name))]
        layers = max(numbers, default=-1) + 1
        checkpoint.require(expected, lambda name: _not_needed(name, layers, self._tied))

    def get(self, name: str, steps: Sequence[tuple[str, Any]] = ()) -> str:
        """The entry of a parameter in float32, made if there is none: its value after the given steps, each
        ("reshape", shape) or ("transpose", axes)."""
        made = self._tied.get(name, name)
        if made in self.map and not steps:
            return made
        final = made if not steps else f"{made}.{'_'.join(f'{op}{_tag(how)}' for op, how in steps)}"
        if final in self.map:
            return final
        source, dtype = self._raw(made)
        for i, (op, how) in enumerate(steps):
            last = i == len(steps) - 1 and dtype == "f32"
            dst = final if last else f"{final}.{dtype}.{i}"
            source = self.map.reshape(dst, source, how) if op == "reshape" else self.map.transpose(dst, source, how)
        return source if dtype == "f32" else self.map.cast(final, source, "f32")

    def constant(self, name: str, value: torch.Tensor) -> str:
        """A tensor that the frontend computes; the checkpoint gives it out under `name` from now on."""
        if name not in self.map:
            self._checkpoint.constants[name] = value.detach().float().reshape(1, -1).clone()
            self.map.source(name, "f32", (1, value.numel()))
            self._tensors[name] = self._checkpoint.constants[name]
        return name

    def _disk(self, name: str) -> list[str | tuple[str, ...]]:
        """The checkpoint's tensors that make a parameter: itself, or for every expert its one or two."""
        stack = _STACK.fullmatch(name)
        if name in self._checkpoint.weights or not self._checkpoint.has_values:
            return [name]
        if stack is None:
            other = [name.replace(a, b) for a, b in _RENAMED if a in name]
            return [next((n for n in other if n in self._checkpoint.weights), name)]
        forms = []
        for form in _EXPERTS:
            wanted = form[:2] if stack["which"] == "gate_up_proj" else form[2:]
            # As many as the config says; more than there are tensors are missing whatever their names.
            count = min(self._tensors[name].shape[0], len(self._checkpoint.weights) + 1)
            forms.append([tuple(t.format(layer=stack["layer"], e=e) for t in wanted) for e in range(count)])
        known = self._checkpoint.weights
        best = max(forms, key=lambda experts: sum(t in known for tensors in experts for t in tensors))
        return list(best)

    def _raw(self, name: str) -> tuple[str, str]:
        """(entry, dtype) of a parameter in its shape in the module and, where there is one, its stored dtype."""
        disk = self._disk(name)
        stored = {self._dtype(tensor) for group in disk for tensor in ((group,) if isinstance(group, str) else group)}
        dtype = stored.pop() if len(stored) == 1 else "f32"
        suffix = "" if dtype == "f32" else f".{dtype}"
        if len(disk) == 1 and isinstance(disk[0], str):
            dst = f"{name}{suffix}"
            if dst not in self.map:
                self._checkpoint.weights[disk[0]].declare(self.map, dst, dtype)
            return dst, dtype
        dst = f"{name}{suffix}"
        if dst in self.map:
            return dst, dtype
        stacks: list[str] = []
        for tensors in zip(*disk, strict=True):
            parts = [self._single(str(tensor), dtype) for tensor in tensors]
            stacks.append(self.map.stack(dst if len(disk[0]) == 1 else f"{dst}.{len(stacks)}", parts))
        return stacks[0] if len(stacks) == 1 else self.map.concat(dst, stacks, axis=1), dtype

    def _single(self, tensor: str, dtype: str) -> str:
        self._checkpoint.weights[tensor].declare(self.map, tensor, dtype)
        return tensor

    def _dtype(self, tensor: str) -> str:
        return self._checkpoint.weights[tensor].dtype


def _tag(how: Sequence[int]) -> str:
    return "x".join(map(str, how))


def _not_needed(name: str, layers: int, tied: Mapping[str, str]) -> bool:
    """Extra tensors that are known: multi-token-prediction layers behind the last one, and buffers of old exports."""
    layer = _LAYER.match(name)
    return name in tied or name.endswith("rotary_emb.inv_freq") or (layer is not None and int(layer[1]) >= layers)
