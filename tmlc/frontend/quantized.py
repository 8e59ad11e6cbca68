"""Quantised checkpoints: which stored tensors are one weight, and how its numbers come of them.

`quantization_config` in config.json names the library that wrote the checkpoint; the shapes and dtypes of the tensors
say the rest. Nothing is dequantised here: each weight becomes entries of a WeightMap (`dequantize` and what it is made
of). The layouts and the arithmetic are those of docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tmlc.errors import CheckpointError, IRError
from tmlc.ir.dequantize import dequantized_type
from tmlc.ir.types import TensorType, dtype_name

if TYPE_CHECKING:
    from tmlc.frontend.checkpoint import Checkpoint, TensorInfo
    from tmlc.ir.weights import WeightMap

FP8 = ("F8_E4M3", "F8_E5M2")
EXPONENTS = ("U8", "F8_E8M0")
COMPUTE = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
_FIX_SHAPES = "the checkpoint is damaged, or config.json is of another one: download or quantise it again"
_FIX_METHOD = "dequantise it with the library that wrote it and save that, or take an export in another form"

#: Checkpoints of these models come from the hub without the config that says how they are quantised.
_INKLING2 = {"quant_method": "fp8", "weight_block_size": [1, 32]}
_HUB_CONFIGS = dict.fromkeys(("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"), _INKLING2)


@dataclass(frozen=True)
class StoredWeight:
    """A weight of the model and where its numbers come from.

    Attributes:
        name: of the weight, as the model has it.
        shape: of its value.
        dtype: of its value, an IR dtype.
        parts: the checkpoint's tensors that it is made of; one for a weight that is stored plainly.
        args: of `dequantize`; empty for a weight that is stored plainly.
        transposed: its last two axes are swapped after that.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[TensorInfo, ...]
    args: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False

    @property
    def floating(self) -> bool:
        """Whether its values are of a floating dtype."""
        return bool(self.args) or self.parts[0].torch_dtype.is_floating_point

    @property
    def stored(self) -> str:
        """How its values are stored, for messages."""
        return self.parts[0].dtype

    def declare(self, weights: WeightMap, dst: str, dtype: str) -> str:
        """Adds the weight as `dst` of the given dtype, with the entries that it is made of; returns `dst`."""
        names = []
        for part in self.parts:
            kind = _type(part)
            if not self.args and kind.dtype == dtype:
                return weights.source(dst, dtype, self.shape, part.name)
            plain = not self.args
            source = f"{dst}.{kind.dtype}" if plain else f"{dst}.{part.name.rpartition('.')[2]}.{kind.dtype}"
            names.append(weights.source(source, kind.dtype, kind.shape, part.name))
        value = names[0]
        if self.args:
            last = not self.transposed and self.dtype == dtype
            value = weights.dequantize(dst if last else f"{dst}.dequantized", names, self.args)
        if self.transposed:
            axes = list(range(len(self.shape)))
            axes[-2:] = axes[-1], axes[-2]
            value = weights.transpose(dst if self.dtype == dtype else f"{dst}.transposed", value, axes)
        return value if value == dst else weights.cast(dst, value, dtype)


class Reader:
    """Collects the quantised weights of one checkpoint, and the tensors that go into them."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self.checkpoint, self.config, self.tensors = checkpoint, config, checkpoint.tensors
        self.where = str(checkpoint.folder / "config.json")
        self.found: dict[str, StoredWeight] = {}  # by the name of the tensor of codes
        self.used: set[str] = set()  # tensors that are not weights by themselves

    def add(
        self,
        name: str,
        parts: Iterable[str],
        args: dict[str, Any],
        transposed: bool = False,
        unused: Iterable[str] = (),
    ) -> None:
        """A weight made of `parts`, the first of them the codes; `unused` are tensors beside it that nothing needs."""
        infos = tuple(self.need(part, name) for part in parts)
        try:
            made = dequantized_type([_type(info) for info in infos], **args)
        except IRError as error:
            where = str(self.checkpoint.folder / infos[0].shard)
            raise CheckpointError(f"{name}: {error.what}", where=where, fix=_FIX_SHAPES) from None
        shape = (*made.shape[:-2], made.shape[-1], made.shape[-2]) if transposed else made.shape
        self.found[infos[0].name] = StoredWeight(name, shape, made.dtype, infos, args, transposed)
        self.used.update(info.name for info in infos)
        self.used.update(other for other in unused if other in self.tensors)

    def need(self, name: str, weight: str) -> TensorInfo:
        """The tensor, or the error that says which weight misses it."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{weight} is quantised, and its tensor {name!r} is missing",
                where=str(self.checkpoint.folder),
                fix=_FIX_SHAPES,
            )
        return self.tensors[name]

    def beside(self, names: Iterable[str]) -> str | None:
        """The first of the names that is a tensor."""
        return next((name for name in names if name in self.tensors), None)

    def refuse(self, what: str, fix: str = _FIX_METHOD) -> CheckpointError:
        return CheckpointError(what, where=self.where, fix=fix)


def stored_weights(checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """The weights of a checkpoint by name, in the order of its tensors.

    Raises:
        CheckpointError: a quantisation that tmlc does not read, or tensors that do not fit the one named.
    """
    # Here, not above: the readers of each library's layouts build on this module.
    from tmlc.frontend.compressed_tensors import compressed_tensors

    readers: dict[str, Callable[[Reader], None]] = {
        "fp8": _fp8,
        "mxfp4": _mxfp4,
        "modelopt": _modelopt,
        "compressed-tensors": compressed_tensors,
    }
    config = _config(checkpoint)
    reader = Reader(checkpoint, config or {})
    if config is not None:
        method = config.get("quant_method")
        if method not in readers:
            known = ", ".join(readers)
            raise reader.refuse(f"quantisation {method!r} is not one that tmlc reads ({known})")
        readers[method](reader)
    weights: dict[str, StoredWeight] = {}
    for name, info in checkpoint.tensors.items():
        made = reader.found.get(name)
        if made is None and name not in reader.used:
            made = StoredWeight(name, info.shape, _type(info).dtype, (info,))
        if made is None:
            continue
        if made.name in weights:
            raise CheckpointError(
                f"{made.name} is there twice, quantised and plain", where=str(checkpoint.folder), fix=_FIX_SHAPES
            )
        weights[made.name] = made
    return weights


def _config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The quantisation config, wherever exporters put it; None for a checkpoint that is not quantised."""
    text = checkpoint.config.get("text_config")
    places = [checkpoint.config, text if isinstance(text, dict) else {}]
    for place in places:
        for key in ("quantization_config", "compression_config"):
            value = place.get(key)
            if value is None:
                continue
            if not isinstance(value, dict):
                where = str(checkpoint.folder / "config.json")
                raise CheckpointError(f"{key} is not an object", where=where, fix=_FIX_SHAPES)
            return value
    if "transformers_version" in checkpoint.config:
        return None
    return _HUB_CONFIGS.get(str(checkpoint.config.get("model_type")))


def _type(info: TensorInfo) -> TensorType:
    return TensorType(dtype_name(info.torch_dtype), info.shape)


def pairs(shape: Iterable[int]) -> list[int]:
    """The shape of a weight whose codes are two a byte."""
    *rest, last = [*shape] or [0]
    return [*rest, 2 * last]


def _fp8(reader: Reader) -> None:
    """transformers' and DeepSeek's: codes and, under one of several names, scales of blocks to multiply with; experts
    may be pairs of fp4 codes. Scales in one byte are exponents (MXFP8 is this with blocks of 1 x 32)."""
    block = reader.config.get("weight_block_size", [128, 128])
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise reader.refuse(f"weight_block_size is {block!r}, not two sizes", _FIX_SHAPES)
    args: dict[str, Any]
    for name, info in reader.tensors.items():
        if info.dtype in ("U8", "I8") and f"{name}_amax" in reader.tensors:
            # Inkling-2 with a loop: NVFP4 whose experts have a factor each.
            parts = [name, *(f"{name}_{what}" for what in ("scale", "amax", "outer_scale_denominator"))]
            args = {"scheme": "fp4", "shape": pairs(info.shape), "block": [1, 16], "global_scale": "ratio"}
            reader.add(name, parts, args)
            continue
        if info.dtype not in (*FP8, "I8") or f"{name.removesuffix('_scale')}_amax" in reader.tensors:
            continue
        stem = name.removesuffix(".weight")
        scale = reader.beside([f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight"])
        scales = reader.need(scale or f"{name}_scale_inv", name)
        shape = list(info.shape)
        args = {"scheme": "fp8", "shape": shape, "block": block or [0, 0]}
        if info.dtype == "I8":
            args = {"scheme": "fp4", "shape": pairs(shape), "block": [1, 32]}
        elif len(scales.shape) < 2 and len(scales.shape) <= len(shape) - 2:
            args["block"] = [0, 0]  # one scale a matrix
        elif len(shape) == len(scales.shape) == 3 and scales.shape[1] == 2 and _halves(shape[1], args["block"]):
            args["block"] = [shape[1] // 2, args["block"][1]]  # gate and up have no scale in common
        unused = [f"{stem}.activation_scale", f"{name}_activation_scale", f"{stem}.input_scale"]
        reader.add(name, [name, scales.name], args, unused=unused)


def _halves(rows: int, block: list[int]) -> bool:
    return rows % 2 == 0 and (block[0] == 0 or rows // 2 <= block[0])


def _mxfp4(reader: Reader) -> None:
    """gpt-oss: blocks [experts, out, groups, 16] of pairs of codes, one exponent a group; the weight has its input axis
    first."""
    for codes, info in reader.tensors.items():
        name = codes.removesuffix("_blocks")
        if name == codes or info.dtype != "U8":
            continue
        if len(info.shape) != 4 or info.shape[-1] != 16:
            raise CheckpointError(
                f"{codes} is {list(info.shape)}, not [experts, rows, groups, 16]",
                where=str(reader.checkpoint.folder / info.shard),
                fix=_FIX_SHAPES,
            )
        experts, rows, groups, size = info.shape
        scales = reader.need(f"{name}_scales", name)
        if scales.dtype not in EXPONENTS:
            raise reader.refuse(f"{scales.name} is {scales.dtype}, not exponents in U8", _FIX_SHAPES)
        args = {"scheme": "fp4", "shape": [experts, rows, groups * size * 2], "block": [1, 32]}
        reader.add(name, [codes, scales.name], args, transposed=True)


_MODELOPT = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8")


def _modelopt(reader: Reader) -> None:
    """NVIDIA's Model Optimizer: the scales of NVFP4 are multiplied with the tensor's, those of FP8 are one a tensor or
    row, those of MXFP8 exponents of 32."""
    algorithm = reader.config.get("quant_algo")
    if algorithm not in _MODELOPT:
        raise reader.refuse(f"quant_algo {algorithm!r} is not one that tmlc reads ({', '.join(_MODELOPT)})")
    for name, info in reader.tensors.items():
        scale, second, stem = f"{name}_scale", f"{name}_scale_2", name.removesuffix(".weight")
        if scale not in reader.tensors or info.dtype not in (*FP8, "U8"):
            continue
        if f"{stem}.pre_quant_scale" in reader.tensors:
            raise reader.refuse(f"{stem} has a pre_quant_scale for its input, which tmlc does not apply")
        shape, scales = list(info.shape), reader.tensors[scale]
        parts, args = [name, scale], {"scheme": "fp8", "shape": shape, "block": [1, 0]}
        if info.dtype == "U8":
            args = {"scheme": "fp4", "shape": pairs(shape), "block": [1, 16]}
            args["global_scale"] = "multiply"
            parts.append(second)
        elif scales.dtype in EXPONENTS:
            args["block"] = [1, 32]
        elif scales.shape in ((), (1,)):
            args["block"] = [0, 0]
        reader.add(name, parts, args, unused=[f"{stem}.input_scale"])
    for name in reader.tensors:
        if name.endswith((".k_proj.k_scale", ".v_proj.v_scale")):
            reader.used.add(name)  # of a quantised cache, which engines do not have
