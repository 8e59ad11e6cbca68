"""Computes a network in numpy, from nothing but what TensorRT's API says of it: layers, tensors, shapes, axes, types.

It knows neither the program nor the emitter, so a wrong axis, mask, index or binding of the emitter shows here, without
a GPU. Floats are kept in float32 and rounded to the type that TensorRT gives each tensor after every layer; sums are
float32. What TensorRT leaves open is taken as documented by ONNX: of equal values `topk` takes the lower index first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tmlc.emit.tensorrt.evaluate_layers import LAYERS, Layer, round_to


class Evaluation:
    """A network that can be run.

    Args:
        trt: the module that the network is of.
        network: an INetworkDefinition; it must not change any more.
        constants: the numbers behind constants that TensorRT's Python API does not hand out (bfloat16, 4-bit codes), by
            the name of the layer's output.
    """

    def __init__(self, trt: Any, network: Any, constants: Mapping[str, np.ndarray]) -> None:
        self.trt, self.network = trt, network
        kind = trt.ILayer.type.__get__
        self.layers: list[tuple[Layer, Callable[..., Any]]] = []
        self.fixed: dict[str, np.ndarray] = {}
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            name = str(kind(layer)).rpartition(".")[2]
            if name not in LAYERS:
                raise NotImplementedError(f"layer {layer.name} is a {name}, which the evaluator does not know")
            view, run = LAYERS[name]
            layer.__class__ = getattr(trt, view)
            entry = Layer(trt, layer, constants)
            if name == "CONSTANT":
                self.fixed[layer.get_output(0).name] = np.asarray(run(entry)[0])
            else:
                self.layers.append((entry, run))
        self._order()

    def _order(self) -> None:
        """Layers behind those whose outputs they read: a network holds them in the order in which they were made."""
        known = {self.network.get_input(k).name for k in range(self.network.num_inputs)} | set(self.fixed)
        ordered, left = [], self.layers
        while left:
            ready = [(e, run) for e, run in left if known.issuperset(e.input_names)]
            if not ready:
                missing = sorted(set(left[0][0].input_names) - known)
                raise ValueError(f"layer {left[0][0].layer.name} reads {missing[:3]}, which nothing makes")
            ordered += ready
            known |= {name for e, _ in ready for name in e.output_names}
            taken = {id(e) for e, _ in ready}
            left = [(e, run) for e, run in left if id(e) not in taken]
        self.layers = ordered

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs of the network by name, for inputs by name.

        Floats of any type come and go as float32, booleans as bool, whole numbers as int32 or int64.

        Raises:
            ValueError: an input is missing, unknown or of a shape that the network does not take; or a layer gives
                another shape than TensorRT says.
        """
        values: dict[str, np.ndarray] = dict(self.fixed)
        for k in range(self.network.num_inputs):
            tensor = self.network.get_input(k)
            if tensor.name not in inputs:
                raise ValueError(f"input {tensor.name} is missing")
            values[tensor.name] = round_to(self.trt, tensor.dtype, np.asarray(inputs[tensor.name]))
            _check(tensor, values[tensor.name])
        if unknown := set(inputs) - set(values):
            raise ValueError(f"the network has no input {sorted(unknown)[0]}")
        for entry, run in self.layers:
            results = run(entry, *(values[name] for name in entry.input_names))
            for index, result in enumerate(results):
                tensor = entry.layer.get_output(index)
                values[tensor.name] = round_to(self.trt, tensor.dtype, result)
                _check(tensor, values[tensor.name])
        outputs = (self.network.get_output(k).name for k in range(self.network.num_outputs))
        return {name: values[name] for name in outputs}


def _check(tensor: Any, value: np.ndarray) -> None:
    said = tuple(tensor.shape)
    fits = len(said) == value.ndim and all(s in (-1, v) for s, v in zip(said, value.shape, strict=True))
    if not fits:
        raise ValueError(f"tensor {tensor.name} is {said} for TensorRT, and {value.shape} was computed")
