"""Ops that norm the rows that they read: products take the weight of the norm along, and are lowered as without it."""

from tmlc.kernels.triton.conv import lower_linear_conv
from tmlc.kernels.triton.linear import lower_linear, lower_linear_steps, lower_linear_swiglu
from tmlc.kernels.triton.registry import lowering

lowering("norm_linear", "modulated_linear")(lower_linear)
lowering("norm_linear_steps", "modulated_linear_steps")(lower_linear_steps)
lowering("norm_linear_swiglu")(lower_linear_swiglu)
lowering("norm_linear_conv_state")(lower_linear_conv)
