"""A network under construction: TensorRT's layers as functions of tensors, named after the op that they come from.

Every function makes one layer. Ranks must match where two tensors meet; dimensions of 1 broadcast, as TensorRT has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tmlc.emit.tensorrt.library import Library, build_error

Tensor = Any  # TensorRT's ITensor; its module is known only at run time


class Graph:
    """Wraps one network.

    Attributes:
        network, trt: TensorRT's network and module.
        sources: for every layer's name, what it was made from ("rms_norm, model.norm at …").
        constants: the numbers of every constant layer by the name of its output, as they were given to TensorRT. Its
            Python API does not hand out bfloat16 and codes again; and it does not copy: they must live till the build.
    """

    def __init__(self, library: Library, builder: Any, network: Any, method: str) -> None:
        self.library, self.builder, self.network, self.trt = library, builder, network, library.api
        self.method = method
        self.sources: dict[str, str] = {}
        self.constants: dict[str, np.ndarray] = {}
        self._op, self._source, self._count = "start", "", 0
        self._cached: dict[Any, Tensor] = {}
        self.types = {
            "f32": self.trt.float32,
            "f16": self.trt.float16,
            "bf16": self.trt.bfloat16,
            "i8": self.trt.int8,
            "i32": self.trt.int32,
            "i64": self.trt.int64,
            "u8": self.trt.uint8,
            "bool": self.trt.bool,
            "i4": self.trt.int4,
        }

    def begin(self, op: str, source: str) -> None:
        """What the layers that follow are made from."""
        self._op, self._source, self._count = op, source, 0

    def _name(self, layer: Any) -> Any:
        """Names a new layer; None is TensorRT's way to refuse one."""
        if layer is None:
            raise build_error(self.builder.logger.errors[-1:], self.method, {"": self._source})
        layer.name = f"{self._op}#{self._count}"
        layer.metadata = self._source
        self.sources[layer.name] = self._source
        self._count += 1
        return layer

    def _out(self, layer: Any, index: int = 0) -> Tensor:
        tensor = self._name(layer).get_output(index)
        tensor.name = f"{layer.name}:{index}"
        return tensor

    # Tensors that come from outside.

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        """A binding; -1 is a dimension that depends on n."""
        return self.network.add_input(name, self.types[dtype], tuple(shape))

    def output(self, tensor: Tensor, name: str) -> None:
        """Makes a tensor a binding; one that is a binding already, or an input, is copied."""
        if tensor.is_network_input or tensor.is_network_output:
            tensor = self._out(self.network.add_identity(tensor))
        tensor.name = name
        self.network.mark_output(tensor)

    def constant(self, array: np.ndarray, dtype: str, shape: Sequence[int] | None = None) -> Tensor:
        """Numbers of the network. bf16 comes as uint16, 4-bit codes as bytes (low half first) with their `shape`."""
        array = np.ascontiguousarray(array)
        dims = tuple(array.shape if shape is None else shape)
        count = int(np.prod(dims, dtype=np.int64))
        layer = self.network.add_constant(dims, self.trt.Weights(self.types[dtype], array.ctypes.data, count))
        out = self._out(layer)
        self.constants[out.name] = array
        return out

    def floats(self, array: Any) -> Tensor:
        """A float32 constant."""
        return self.constant(np.asarray(array, np.float32), "f32")

    def integers(self, array: Any) -> Tensor:
        """An int32 constant."""
        return self.constant(np.asarray(array, np.int32), "i32")

    def number(self, value: float, like: Tensor) -> Tensor:
        """One number that broadcasts against `like`, of its type (float32, int32 or int64)."""
        dtype = {self.trt.float32: np.float32, self.trt.int32: np.int32, self.trt.int64: np.int64}[like.dtype]
        name = {np.float32: "f32", np.int32: "i32", np.int64: "i64"}[dtype]
        return self.constant(np.full((1,) * len(like.shape), value, dtype), name)

    def once(self, key: Any, make: Any) -> Tensor:
        """What `make()` gives, made only the first time that this key is asked for."""
        if key not in self._cached:
            self._cached[key] = make()
        return self._cached[key]

    # One element after the other.

    def _binary(self, kind: str, a: Tensor, b: Tensor) -> Tensor:
        return self._out(self.network.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, kind)))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("SUM", a, b)

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("SUB", a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("PROD", a, b)

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("DIV", a, b)

    def maximum(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("MAX", a, b)

    def minimum(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("MIN", a, b)

    def floor_div(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("FLOOR_DIV", a, b)

    def less(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("LESS", a, b)

    def greater(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("GREATER", a, b)

    def equal(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("EQUAL", a, b)

    def both(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("AND", a, b)

    def either(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary("OR", a, b)

    def plus(self, a: Tensor, value: float) -> Tensor:
        return self.add(a, self.number(value, a))

    def times(self, a: Tensor, value: float) -> Tensor:
        return self.mul(a, self.number(value, a))

    def unary(self, kind: str, x: Tensor) -> Tensor:
        """EXP, LOG, SQRT, RECIP, ABS, NEG, SIN, COS, NOT, ROUND (ties to even)."""
        return self._out(self.network.add_unary(x, getattr(self.trt.UnaryOperation, kind)))

    def activation(self, kind: str, x: Tensor, alpha: float = 0.0, beta: float = 0.0) -> Tensor:
        """SIGMOID, TANH, GELU_ERF, or CLIP to alpha..beta."""
        layer = self.network.add_activation(x, getattr(self.trt.ActivationType, kind))
        if kind == "CLIP":
            layer.alpha, layer.beta = alpha, beta
        return self._out(layer)

    def select(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """a where the condition holds, else b."""
        return self._out(self.network.add_select(condition, a, b))

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """x in another type; x itself where it has that type."""
        wanted = self.types[dtype]
        return x if x.dtype == wanted else self._out(self.network.add_cast(x, wanted))

    # Over an axis.

    def reduce(self, kind: str, x: Tensor, axis: int) -> Tensor:
        """SUM, AVG, MAX or MIN over one axis, which stays with size 1."""
        return self._out(self.network.add_reduce(x, getattr(self.trt.ReduceOperation, kind), 1 << axis, True))

    def softmax(self, x: Tensor, axis: int) -> Tensor:
        layer = self.network.add_softmax(x)
        layer.axes = 1 << axis
        return self._out(layer)

    def topk(self, x: Tensor, count: int, axis: int) -> tuple[Tensor, Tensor]:
        """The largest values, best first, and their int32 indices."""
        layer = self._name(self.network.add_topk(x, self.trt.TopKOperation.MAX, count, 1 << axis))
        return self._named(layer, 0), self._named(layer, 1)

    def _named(self, layer: Any, index: int) -> Tensor:
        tensor = layer.get_output(index)
        tensor.name = f"{layer.name}:{index}"
        return tensor

    def matmul(self, a: Tensor, b: Tensor, transpose_b: bool = False) -> Tensor:
        """a · b, or a · bᵀ, over the last two axes; of one type, and the result has it too."""
        none, turned = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        return self._out(self.network.add_matrix_multiply(a, none, b, turned if transpose_b else none))

    # Shapes.

    def reshape(self, x: Tensor, dims: Sequence[int], before: Sequence[int] | None = None,
                after: Sequence[int] | None = None) -> Tensor:  # fmt: skip
        """x with its axes permuted by `before`, reshaped (-1: what is left), then permuted by `after`."""
        layer = self.network.add_shuffle(x)
        layer.zero_is_placeholder = False
        if before is not None:
            layer.first_transpose = tuple(before)
        layer.reshape_dims = tuple(dims)
        if after is not None:
            layer.second_transpose = tuple(after)
        return self._out(layer)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        layer = self.network.add_shuffle(x)
        layer.first_transpose = tuple(order)
        return self._out(layer)

    def columns(self, x: Tensor, axis: int, start: int, size: int, step: int = 1) -> Tensor:
        """`size` entries of one axis from `start` on; beyond the end there are zeros."""
        layer = self.network.add_slice(x, (start,), (size,), (step,))
        layer.axes = (axis,)
        if 0 <= x.shape[axis] < start + (size - 1) * step + 1:
            layer.mode = self.trt.SampleMode.FILL
        return self._out(layer)

    def window(self, x: Tensor, start: Sequence[int] | Tensor, size: Sequence[int] | Tensor) -> Tensor:
        """A block of x; start and size are numbers or int64 shape tensors. Outside x there are zeros."""
        rank = len(x.shape)
        fixed_start = tuple(start) if isinstance(start, list | tuple) else (0,) * rank
        fixed_size = tuple(size) if isinstance(size, list | tuple) else (1,) * rank
        layer = self.network.add_slice(x, fixed_start, fixed_size, (1,) * rank)
        if not isinstance(start, list | tuple):
            layer.set_input(1, start)
        if not isinstance(size, list | tuple):
            layer.set_input(2, size)
        layer.mode = self.trt.SampleMode.FILL
        return self._out(layer)

    def shape(self, x: Tensor) -> Tensor:
        """The sizes of x: int64 [rank]."""
        return self._out(self.network.add_shape(x))

    def sizes(self, values: Sequence[int]) -> Tensor:
        """An int64 constant for work on shapes."""
        return self.constant(np.asarray(values, np.int64), "i64")

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        layer = self.network.add_concatenation(list(parts))
        layer.axis = axis
        return self._out(layer)

    # Places.

    def gather(self, data: Tensor, indices: Tensor, axis: int, batch: int = 0) -> Tensor:
        """Slices of `data` along an axis: the shape of `indices` takes that axis' place. batch 1: for each entry of
        axis 0 its own indices."""
        layer = self.network.add_gather(data, indices, axis)
        layer.num_elementwise_dims = batch
        return self._out(layer)

    def pick(self, data: Tensor, indices: Tensor, axis: int) -> Tensor:
        """One element for each index: out[i, j] = data[i, indices[i, j]] for axis 1."""
        layer = self.network.add_gather_v2(data, indices, self.trt.GatherMode.ELEMENT)
        layer.axis = axis
        return self._out(layer)

    def scatter_rows(self, data: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """data [C, d] with rows [n, d] in the places of index int32 [n, 1]."""
        return self._out(self.network.add_scatter(data, index, rows, self.trt.ScatterMode.ND))

    def cache_update(self, cache: Tensor, rows: Tensor, at: Tensor, name: str) -> Tensor:
        """cache [1, G, C, D] with rows [1, G, n, D] written from index at[0] on; the output is the cache's memory."""
        layer = self._name(self.network.add_kv_cache_update(cache, rows, at, self.trt.KVCacheMode.LINEAR))
        out = layer.get_output(0)
        out.name = name
        self.network.mark_output(out)
        return out

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """softmax(q · kᵀ + mask) · v; q [1, H, n, D], k and v [1, G, C, D], mask [1, 1 or H, n, C], all of one type."""
        norm, none = self.trt.AttentionNormalizationOp.SOFTMAX, self.trt.CausalMaskKind.NONE
        layer = self.network.add_attention_v2(q, k, v, norm, none)
        if layer is None:
            raise build_error(self.builder.logger.errors[-1:], self.method, {"": self._source})
        layer.mask, layer.decomposable = mask, True
        layer.name = f"{self._op}#{self._count}"
        layer.metadata = self._source
        self.sources[layer.name] = self._source
        self._count += 1
        out = layer.get_output(0)
        out.name = f"{layer.name}:0"
        return out

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: str) -> Tensor:
        """codes · scales: one scale for each block of entries along the last axis."""
        return self._out(self.network.add_dequantize(codes, scales, self.types[dtype]))
