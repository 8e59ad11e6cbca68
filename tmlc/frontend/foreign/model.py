"""The transformers module of a checkpoint: built from config.json on the meta device, and exported whole.

Nothing of the checkpoint's weights is read. Configs that the matchers cannot serve are refused before the export.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode

from tmlc.errors import CheckpointError, FrontendError, UsageError, reason
from tmlc.frontend.checkpoint import Checkpoint
from tmlc.frontend.foreign.graph import simplify
from tmlc.frontend.foreign.versions import INSTALL, check_version
from tmlc.model_zoo.interaction.config import MOST_LAYERS

#: model_type → the class that a checkpoint of it must have been saved from.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
#: Angles of other variants depend on the length of the sequence, which a stream does not have.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_EXAMPLE = 1021  # a length that is no other size of a model: export would take equal sizes for one
_MOST = 1 << 16
_NOISY = ("torch._guards", "torch.export._trace", "torch._dynamo", "torch.fx.experimental.symbolic_shapes")


@dataclass(frozen=True)
class Exported:
    """A foreign model as an aten graph.

    Attributes:
        graph: simplified; its results are the embedded tokens, the hidden states after the last norm, and the logits.
        parameters: placeholder → name in the module, for what the checkpoint holds.
        constants: placeholder → (name, value), for buffers that follow from the config.
        symbol: how shapes in the graph write the number of positions.
    """

    graph: fx.Graph
    parameters: dict[fx.Node, str]
    constants: dict[fx.Node, tuple[str, Tensor]]
    symbol: str


def build(checkpoint: Checkpoint) -> tuple[nn.Module, list[str]]:
    """The module of a checkpoint on the meta device, with attention and experts in the forms that the matchers read,
    and notes on the version of transformers.

    Raises:
        UsageError: transformers is not installed, or its version is outside the supported range.
        CheckpointError: the config is not one of FAMILIES, or asks for what cannot be compiled.
    """
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise UsageError(
            f"transformers is needed to read a {checkpoint.config['model_type']} checkpoint: {error}", fix=INSTALL
        ) from None
    notes = check_version(transformers.__version__)
    raw, where = dict(checkpoint.config), str(checkpoint.folder / "config.json")
    family = FAMILIES[raw["model_type"]]
    declared = raw.get("architectures") or [family]
    if not isinstance(declared, list) or family not in declared:
        named = ", ".join(map(str, declared)) if isinstance(declared, list) else str(declared)
        fix = f"tmlc compiles {family} of this model_type"
        raise CheckpointError(f"the checkpoint is of {named[:100]}", where=where, fix=fix)
    if not hasattr(transformers, family):
        raise UsageError(f"transformers {transformers.__version__} has no {family}", fix=f"{INSTALL} --upgrade")
    _refuse_layers(raw, where, checkpoint)
    with _quiet("transformers"):
        try:
            config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        except Exception as error:
            what = f"transformers refuses the config: {reason(error)}"
            raise CheckpointError(what, where=where, fix="correct it") from error
        _refuse_rotations(config, where)
        config._attn_implementation = "eager"
        try:
            with torch.device("meta"):
                model = getattr(transformers, family)(config).eval()
        except Exception as error:
            what = f"{family} cannot be built: {reason(error)}"
            raise CheckpointError(what, where=where, fix="transformers itself refuses this config") from error
        if any(hasattr(module, "is_transposed") for module in model.modules()):
            model.set_experts_implementation("batched_mm")
    return model, notes


def _refuse_layers(raw: Mapping[str, Any], where: str, checkpoint: Checkpoint) -> None:
    """More layers than the checkpoint could have weights for: transformers would build them all, and before that, as it
    reads the config, a list of their types."""
    layers = raw.get("num_hidden_layers", 1)
    most, bound = MOST_LAYERS, f"at most {MOST_LAYERS} are built"
    if checkpoint.has_values:
        most = len(checkpoint.tensors)
        bound = f"the checkpoint has {most} tensors"
    if not isinstance(layers, int) or not 1 <= layers <= most:
        what = f"num_hidden_layers is {str(layers)[:40]}, and {bound}"
        raise CheckpointError(what, where=where, fix="give the config and the shards of one model")


def _refuse_rotations(config: Any, where: str) -> None:
    """Rotations whose graph would be another one at another length, or that need files beside the config."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in rope.values() if rope and all(isinstance(v, Mapping) for v in rope.values()) else [rope]:
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise CheckpointError(
                f"rope_type is {kind!r}", where=f"{where}, rope_parameters", fix=f"tmlc has {', '.join(ROPE_TYPES)}"
            )


class _PlainNumbers(TorchFunctionMode):
    """Makes `torch.tensor(number)` a fill. On the meta device the tensor has no value that could be read out of the
    exported program afterwards; a fill keeps the number in the graph (the causal mask of transformers before 5.20)."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if function is torch.tensor and len(args) == 1 and isinstance(args[0], (bool, int, float)):
            return torch.full((), args[0], **named)
        return function(*args, **named)


class _Whole(nn.Module):
    """The model with its two inner results: tokens embedded, and hidden states before the head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen: dict[str, Any] = {}
        model: Any = self.model
        hooks = [
            model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.update(embedded=out)),
            model.base_model.register_forward_hook(lambda m, args, out: seen.update(hidden=out[0])),
        ]
        try:
            with _PlainNumbers():
                logits = model(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return seen["embedded"], seen["hidden"], logits


def export(model: nn.Module) -> Exported:
    """Traces the whole model over [1, n] tokens.

    Raises:
        FrontendError: torch.export refuses the model, or a buffer of it is unknown.
    """
    ids = torch.zeros(1, _EXAMPLE, dtype=torch.long, device="meta")
    length = torch.export.Dim("n", min=1, max=_MOST)
    with _quiet(*_NOISY, "transformers"), torch.no_grad():
        try:
            exported = torch.export.export(_Whole(model), (ids,), dynamic_shapes=({1: length},), strict=False)
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise FrontendError(
                f"torch.export refused the model: {first}",
                where=type(model).__name__,
                fix="this version of transformers or torch is outside the range that tmlc supports",
            ) from error
    parameters: dict[fx.Node, str] = {}
    constants: dict[fx.Node, tuple[str, Tensor]] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    graph, symbol = exported.graph, ""
    kept = set(model.state_dict(keep_vars=True))
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        name = str(spec.target).removeprefix("model.")
        if spec.kind == InputKind.USER_INPUT:
            symbol = str(node.meta["val"].shape[1])
        elif name in kept:
            parameters[node] = name
        elif node.users:
            constants[node] = (name, _computed(model, name))
    simplify(graph)
    return Exported(graph, parameters, constants, symbol)


def _computed(model: nn.Module, name: str) -> Tensor:
    """The value of a buffer that checkpoints do not hold: the module that owns it is built again, on the CPU."""
    path, _, buffer = name.rpartition(".")
    owner = model.get_submodule(path)
    config = getattr(owner, "config", None)
    try:
        with torch.device("cpu"):
            value = getattr(type(owner)(config), buffer)
    except Exception as error:
        raise FrontendError(
            f"the buffer {name} is not in the checkpoint and cannot be computed from the config: {error}",
            where=f"{path} ({type(owner).__name__})",
            fix="this version of transformers is outside the range that tmlc supports",
        ) from error
    return value.detach().float()


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """What libraries would print while they work is in their exceptions, or of no use."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, names)}
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
