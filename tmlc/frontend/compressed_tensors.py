"""Checkpoints in the `compressed-tensors` form (llm-compressor, vLLM): from its config groups and tensor names to
the arguments of `dequantize`. The arithmetic is in the dtype of the scales, as the package has it; its fp4 and mx forms
make bfloat16.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tmlc.errors import CheckpointError
from tmlc.frontend.quantized import COMPUTE, EXPONENTS, FP8, pairs

if TYPE_CHECKING:
    from tmlc.frontend.quantized import Reader

PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
PLAIN = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
_UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_CACHE = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point")
_FIX = "the checkpoint is damaged, or config.json is of another one: quantise it again"


def compressed_tensors(reader: Reader) -> None:
    """Finds every weight that a config group quantises."""
    sparsity = reader.config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise reader.refuse(f"sparsity format {sparsity['format']!r} is not one that tmlc reads")
    groups = reader.config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise reader.refuse("config_groups is not an object of schemes", _FIX)
    for codes, info in reader.tensors.items():
        name = codes.removesuffix("_packed")
        if name == codes and (info.dtype not in (*FP8, "I8") or f"{name}_scale" not in reader.tensors):
            continue
        module = name.rpartition(".")[0]
        group = _group(reader, module, groups)
        form = group.get("format") or reader.config.get("format")
        if form not in (PLAIN if name == codes else PACKED):
            known = ", ".join((*PACKED, *PLAIN))
            raise reader.refuse(f"{codes} is stored as {form!r}, which is not one that tmlc reads ({known})")
        if f"{name}_g_idx" in reader.tensors:
            raise reader.refuse(f"{name} has its columns reordered (g_idx), which tmlc does not read")
        parts, args = _weight(reader, name, codes, str(form), group["weights"])
        reader.add(name, parts, args, unused=[f"{name}_shape", *(f"{module}.{other}" for other in _UNUSED)])
    if reader.config.get("kv_cache_scheme") is not None:
        reader.used.update(name for name in reader.tensors if name.endswith(_CACHE))


def _group(reader: Reader, module: str, groups: dict[str, Any]) -> dict[str, Any]:
    """The group that quantises the weight of a module: the one that names it, then one whose pattern fits, then the one
    for a class of modules. (Which class a module has is not known here, so only one such group may be there.)"""
    exact, patterns, classes = [], [], []
    for group in groups.values():
        if not isinstance(group.get("weights"), dict):
            continue
        targets = [str(target) for target in group.get("targets") or []]
        try:
            fits = any(t.startswith("re:") and re.match(t[3:], module) for t in targets)
        except re.error as error:
            raise reader.refuse(f"a target is not a pattern: {error}", _FIX) from None
        if module in targets:
            exact.append(group)
        elif fits:
            patterns.append(group)
        elif any("." not in target for target in targets):
            classes.append(group)
    for found in (exact, patterns, classes):
        if len(found) == 1:
            return found[0]
        if found:
            raise reader.refuse(f"{len(found)} groups quantise {module}", "name its module in the one that does")
    raise reader.refuse(f"{module} is quantised, and no group of config_groups names it", _FIX)


def _weight(
    reader: Reader, name: str, codes: str, form: str, weights: dict[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """The tensors of one weight and the arguments of `dequantize`."""
    info, scales = reader.tensors[codes], reader.need(f"{name}_scale", name)
    bits, integer = weights.get("num_bits", 8), weights.get("type", "int") == "int"
    symmetric = bool(weights.get("symmetric", True))
    strategy, block = _block(reader, name, weights)
    parts = [codes, scales.name]
    args: dict[str, Any] = {"shape": list(info.shape), "block": block}
    if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        args |= {"scheme": "fp4", "shape": pairs(info.shape), "dtype": "bf16"}
    elif form == "pack-quantized":
        args |= {"scheme": "packed_int", "bits": bits, "shape": _shape(reader, name)}
    else:
        args |= {"scheme": "int" if integer else "fp8"}
    wanted = {"nvfp4-pack-quantized": FP8[:1], "mxfp4-pack-quantized": EXPONENTS, "mxfp8-quantized": EXPONENTS}
    if scales.dtype not in wanted.get(form, tuple(COMPUTE)):
        raise reader.refuse(f"{scales.name} is {scales.dtype}, which {form} does not have", _FIX)
    if integer != (args["scheme"] in ("int", "packed_int")) or (
        not integer and bits != (4 if args["scheme"] == "fp4" else 8)
    ):
        raise reader.refuse(f"{name}: {form} of {bits} bits of type {weights.get('type')!r} is not known", _FIX)
    if form == "nvfp4-pack-quantized":
        total = reader.need(f"{name}_global_scale", name)
        args |= {"global_scale": "divide", "compute": "bf16" if total.dtype == "BF16" else "f32"}
        parts.append(total.name)
    elif form.startswith("mx"):
        args["dtype"] = "bf16"  # scales are powers of two: every product is exact before that
    else:  # float16 is read as float32, which holds it exactly; only the arithmetic is float16's
        args["compute"] = COMPUTE[scales.dtype]
        args["dtype"] = "bf16" if args["compute"] == "bf16" else "f32"
    if integer and (not symmetric or f"{name}_zero_point" in reader.tensors):
        packed = form == "pack-quantized" and not symmetric and strategy in ("group", "channel")
        args["zero_point"] = "packed" if packed else "plain"
        parts.insert(2, f"{name}_zero_point")
    elif not symmetric:
        raise reader.refuse(f"{name} is asymmetric and {form}, which the package does not read either", _FIX)
    return parts, args


def _block(reader: Reader, name: str, weights: dict[str, Any]) -> tuple[str, list[int]]:
    """The strategy, and rows and columns that share a scale."""
    size, structure = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if isinstance(structure, str):
        structure = [int(part) for part in structure.split("x") if part.isdigit()]
    blocks = {"tensor": [0, 0], "channel": [1, 0], "group": [1, size], "tensor_group": [1, size], "block": structure}
    block: Any = blocks.get(strategy)
    sound = isinstance(block, list) and len(block) == 2 and all(type(part) is int and part >= 0 for part in block)
    if not sound:
        raise reader.refuse(f"{name} is quantised with strategy {strategy!r} and blocks of {block!r}", _FIX)
    return strategy, block


def _shape(reader: Reader, name: str) -> list[int]:
    """The shape that a packed weight has, which its words do not tell."""
    info = reader.need(f"{name}_shape", name)
    if info.dtype not in ("I64", "I32") or len(info.shape) != 1:
        found = f"{info.name} is {info.dtype}{list(info.shape)}, not a shape"
        raise CheckpointError(found, where=str(reader.checkpoint.folder / info.shard), fix=_FIX)
    return [int(size) for size in reader.checkpoint.get(info.name)]
