"""What each kind of TensorRT layer computes, in numpy, read from the layer's own attributes (`evaluate`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Result = tuple[np.ndarray, ...]


class Layer:
    """One layer, seen as its own class, with the names of the tensors it reads and makes."""

    def __init__(self, trt: Any, layer: Any, constants: Mapping[str, np.ndarray]) -> None:
        self.trt, self.layer, self.constants = trt, layer, constants
        inputs = [layer.get_input(k) for k in range(layer.num_inputs)]
        self.present = [tensor is not None for tensor in inputs]
        self.input_names = [tensor.name for tensor in inputs if tensor is not None]
        self.output_names = [layer.get_output(k).name for k in range(layer.num_outputs)]

    def slots(self, given: tuple[np.ndarray, ...]) -> list[np.ndarray | None]:
        """The inputs by number; None where a layer leaves one out."""
        rest = iter(given)
        return [next(rest) if there else None for there in self.present]


def bf16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16: nearest, ties to even; NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (
        (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16) << np.uint64(16)
    ) & np.uint64(0xFFFFFFFF)
    out = rounded.astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), out)


def round_to(trt: Any, dtype: Any, x: np.ndarray) -> np.ndarray:
    """x as a tensor of this type holds it: floats as float32, rounded."""
    if dtype == trt.float32:
        return np.asarray(x, np.float32)
    if dtype == trt.float16:
        with np.errstate(over="ignore"):
            return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)
    if dtype == trt.bfloat16:
        return bf16(np.asarray(x, np.float32))
    kinds = {trt.int32: np.int32, trt.int64: np.int64, trt.bool: np.bool_, trt.uint8: np.uint8,
             trt.int8: np.int8, trt.int4: np.int8}  # fmt: skip
    return np.asarray(x).astype(kinds[dtype])


def _constant(e: Layer) -> Result:
    layer = e.layer
    shape, tensor = tuple(layer.shape), layer.get_output(0)
    stored = layer.weights
    if isinstance(stored, np.ndarray):
        return (round_to(e.trt, tensor.dtype, stored.reshape(shape)),)
    raw = e.constants[tensor.name]
    if tensor.dtype == e.trt.bfloat16:
        return ((raw.astype(np.uint32) << 16).view(np.float32).reshape(shape),)
    if tensor.dtype == e.trt.int4:
        halves = np.stack([raw & 15, raw >> 4], -1).reshape(shape).astype(np.int16)
        return (np.where(halves > 7, halves - 16, halves).astype(np.int8),)
    raise NotImplementedError(f"constant {tensor.name} of {tensor.dtype}")


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "SUM": np.add, "SUB": np.subtract, "PROD": np.multiply, "MAX": np.maximum, "MIN": np.minimum, "POW": np.power,
    "FLOOR_DIV": np.floor_divide, "AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor,
    "EQUAL": np.equal, "GREATER": np.greater, "LESS": np.less,
}  # fmt: skip


def _elementwise(e: Layer, a: np.ndarray, b: np.ndarray) -> Result:
    name = e.layer.op.name
    if name == "DIV":
        return (np.divide(a, b) if a.dtype.kind == "f" else np.trunc(a / b),)
    return (_BINARY[name](a, b),)


def _erf(x: np.ndarray) -> np.ndarray:
    from math import erf

    return np.vectorize(erf, otypes=[np.float64])(x.astype(np.float64))


_UNARY: dict[str, Callable[[Any], Any]] = {
    "EXP": np.exp, "LOG": np.log, "SQRT": np.sqrt, "ABS": np.abs, "NEG": np.negative, "SIN": np.sin, "COS": np.cos,
    "ROUND": np.rint, "NOT": np.logical_not, "RECIP": np.reciprocal, "ERF": _erf,
}  # fmt: skip


def _unary(e: Layer, x: np.ndarray) -> Result:
    return (_UNARY[e.layer.op.name](x),)


def _activation(e: Layer, x: np.ndarray) -> Result:
    layer = e.layer
    kind = layer.type.name
    wide = x.astype(np.float64)
    if kind == "SIGMOID":
        return (0.5 * (1 + np.tanh(wide / 2)),)
    if kind == "TANH":
        return (np.tanh(wide),)
    if kind == "GELU_ERF":
        return (wide * 0.5 * (1 + _erf(wide / np.sqrt(2.0))),)
    if kind == "CLIP":
        return (np.clip(x, np.float32(layer.alpha), np.float32(layer.beta)),)
    if kind == "RELU":
        return (np.maximum(x, 0),)
    raise NotImplementedError(f"activation {kind} of {layer.name}")


def _axes(mask: int, rank: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if mask >> axis & 1)


def _reduce(e: Layer, x: np.ndarray) -> Result:
    kinds: dict[str, Callable[..., Any]] = {
        "SUM": np.sum,
        "PROD": np.prod,
        "MAX": np.max,
        "MIN": np.min,
        "AVG": np.mean,
    }
    return (kinds[e.layer.op.name](x, axis=_axes(e.layer.axes, x.ndim), keepdims=e.layer.keep_dims),)


def _exp_shares(x: np.ndarray, axis: tuple[int, ...] | int) -> np.ndarray:
    weights = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(weights / weights.sum(axis=axis, keepdims=True))


def _softmax(e: Layer, x: np.ndarray) -> Result:
    return (_exp_shares(x, _axes(e.layer.axes, x.ndim)),)


def _topk(e: Layer, x: np.ndarray) -> Result:
    (axis,) = _axes(e.layer.axes, x.ndim)
    keys = -x if e.layer.op.name == "MAX" else x
    order = np.argsort(keys, axis=axis, kind="stable")
    chosen = np.take(order, range(e.layer.k), axis=axis)
    return np.take_along_axis(x, chosen, axis), chosen


def _matmul(e: Layer, a: np.ndarray, b: np.ndarray) -> Result:
    turned = e.trt.MatrixOperation.TRANSPOSE
    if e.trt.MatrixOperation.VECTOR in (e.layer.op0, e.layer.op1):
        raise NotImplementedError(f"vector operand of {e.layer.name}")
    a = np.swapaxes(a, -1, -2) if e.layer.op0 == turned else a
    b = np.swapaxes(b, -1, -2) if e.layer.op1 == turned else b
    return (np.matmul(a, b),)


def _shuffle(e: Layer, x: np.ndarray, *more: np.ndarray) -> Result:
    layer = e.layer
    if more:
        dims = [int(v) for v in more[0]]
    first = list(layer.first_transpose)[: x.ndim]
    x = x.transpose(first)
    if not more:
        given = layer.reshape_dims
        dims = [int(v) for v in given] if _set(given) else list(x.shape)
    if layer.zero_is_placeholder:
        dims = [x.shape[k] if v == 0 else v for k, v in enumerate(dims)]
    x = x.reshape(dims)
    return (x.transpose(list(layer.second_transpose)[: x.ndim]),)


def _slice(e: Layer, *given: np.ndarray) -> Result:
    layer = e.layer
    x, start, size, stride, fill, axes = [*e.slots(given), None, None, None, None, None][:6]
    assert x is not None
    starts = _numbers(start, layer.start)
    sizes = _numbers(size, layer.shape)
    strides = _numbers(stride, layer.stride)
    named = _numbers(axes, layer.axes) if axes is not None or _set(layer.axes) else list(range(x.ndim))
    mode = layer.mode.name
    for axis, begin, count, step in zip(named, starts, sizes, strides, strict=True):
        index = begin + step * np.arange(count)
        inside = (index >= 0) & (index < x.shape[axis])
        if mode == "STRICT_BOUNDS" and not inside.all():
            raise ValueError(f"layer {layer.name} reads outside {x.shape} on axis {axis}")
        if mode == "FILL":
            value = 0 if fill is None else fill
            shape = [1] * x.ndim
            shape[axis] = count
            room = np.zeros(1, x.dtype) if x.shape[axis] == 0 else np.take(x, np.where(inside, index, 0), axis)
            x = np.where(inside.reshape(shape), room, np.asarray(value, x.dtype))
        elif mode == "CLAMP":
            x = np.take(x, np.clip(index, 0, x.shape[axis] - 1), axis)
        elif mode == "WRAP":
            x = np.take(x, index % x.shape[axis], axis)
        elif mode == "STRICT_BOUNDS":
            x = np.take(x, index, axis)
        else:
            raise NotImplementedError(f"slice mode {mode} of {layer.name}")
    return (x,)


def _set(dims: Any) -> bool:
    """False for dimensions that nobody has set: None, or ones without a length."""
    try:
        return dims is not None and len(dims) > 0
    except (TypeError, ValueError):
        return False


def _numbers(tensor: np.ndarray | None, fixed: Any) -> list[int]:
    return [int(v) for v in (fixed if tensor is None else tensor)]


def _concat(e: Layer, *parts: np.ndarray) -> Result:
    return (np.concatenate(parts, e.layer.axis),)


def _gather(e: Layer, data: np.ndarray, index: np.ndarray) -> Result:
    layer = e.layer
    axis, mode = layer.axis, layer.mode.name
    if mode == "ELEMENT":
        return (np.take_along_axis(data, _inside(layer, index, data.shape[axis]), axis),)
    if mode == "ND":
        batch = layer.num_elementwise_dims
        if batch:
            raise NotImplementedError(f"batched ND gather of {layer.name}")
        return (data[tuple(np.moveaxis(index, -1, 0))],)
    index = _inside(layer, index, data.shape[axis])
    if layer.num_elementwise_dims == 0:
        return (np.take(data, index, axis),)
    if data.shape[0] != index.shape[0]:
        raise ValueError(f"layer {layer.name}: {data.shape[0]} rows and {index.shape[0]} rows of indices")
    return (np.stack([np.take(d, i, axis - 1) for d, i in zip(data, index, strict=True)]),)


def _inside(layer: Any, index: np.ndarray, size: int) -> np.ndarray:
    """Indices that lie inside; TensorRT leaves others undefined, so they are an error here."""
    if index.size and (int(index.min()) < 0 or int(index.max()) >= size):
        raise ValueError(f"layer {layer.name} gathers {int(index.min())}..{int(index.max())} of {size}")
    return index


def _scatter(e: Layer, data: np.ndarray, index: np.ndarray, updates: np.ndarray) -> Result:
    out = data.copy()
    if e.layer.mode.name == "ND":
        out[tuple(np.moveaxis(index, -1, 0))] = updates
    else:
        np.put_along_axis(out, index, updates, e.layer.axis)
    return (out,)


def _select(e: Layer, condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> Result:
    return (np.where(condition, a, b),)


def _cache(e: Layer, cache: np.ndarray, rows: np.ndarray, at: np.ndarray) -> Result:
    out = cache.copy()
    for batch, begin in enumerate(at):
        stop = int(begin) + rows.shape[2]
        if begin < 0 or stop > cache.shape[2]:
            raise ValueError(f"layer {e.layer.name} writes {int(begin)}..{stop} of {cache.shape[2]} indices")
        out[batch, :, int(begin) : stop] = rows[batch]
    return (out,)


def _attention_input(e: Layer, *given: np.ndarray) -> Result:
    """The whole attention: its boundary's other side only hands the result on."""
    helper = e.layer.attention
    if helper.norm_op.name != "SOFTMAX" or helper.causal_kind.name != "NONE":
        raise NotImplementedError(f"attention {helper.name}: {helper.norm_op}, {helper.causal_kind}")
    mask_name = helper.mask.name if helper.mask is not None else None
    names = [helper.get_input(k).name for k in range(3)]
    by_name = dict(zip(e.input_names, given, strict=True))
    q, k, v = (by_name[name] for name in names)
    turns = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, turns, 1), np.repeat(v, turns, 1)
    scores = q @ np.swapaxes(k, 2, 3)
    if mask_name is not None:
        mask = by_name[mask_name]
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    return (_exp_shares(scores, 3) @ v,)


def _pass_on(e: Layer, x: np.ndarray) -> Result:
    return (x,)


def _dequantize(e: Layer, codes: np.ndarray, scale: np.ndarray, *zero: np.ndarray) -> Result:
    if zero and np.any(zero[0]):
        raise NotImplementedError(f"zero points of {e.layer.name}")
    if scale.ndim == codes.ndim and scale.ndim > 0:
        for axis, (count, blocks) in enumerate(zip(codes.shape, scale.shape, strict=True)):
            scale = np.repeat(scale, count // blocks, axis)
    elif scale.ndim == 1:
        shape = [1] * codes.ndim
        shape[e.layer.axis] = scale.size
        scale = scale.reshape(shape)
    return (codes.astype(np.float32) * scale,)


def _shape(e: Layer, x: np.ndarray) -> Result:
    return (np.array(x.shape, np.int64),)


LAYERS: dict[str, tuple[str, Callable[..., Result]]] = {
    "CONSTANT": ("IConstantLayer", _constant),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "UNARY": ("IUnaryLayer", _unary),
    "ACTIVATION": ("IActivationLayer", _activation),
    "REDUCE": ("IReduceLayer", _reduce),
    "SOFTMAX": ("ISoftMaxLayer", _softmax),
    "TOPK": ("ITopKLayer", _topk),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matmul),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "CONCATENATION": ("IConcatenationLayer", _concat),
    "GATHER": ("IGatherLayer", _gather),
    "SCATTER": ("IScatterLayer", _scatter),
    "SELECT": ("ISelectLayer", _select),
    "CAST": ("ICastLayer", _pass_on),
    "IDENTITY": ("IIdentityLayer", _pass_on),
    "SHAPE": ("IShapeLayer", _shape),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _cache),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention_input),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _pass_on),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
}
"""The class to see a layer as, and what it computes, by the name of its kind."""
