"""Bits of a stored weight: what the cost model and the advice of a profile count with. No compiler here."""

BITS = {"fp32": 32.0, "bf16": 16.0, "fp8": 8.0 + 32.0 / 128, "int8": 8.5, "int4": 4.75}
"""Bits of one weight of a product as stored, scales and zero points with it: int8 and int4 as docs/plan-format.md has
them, fp8 with a float32 scale for 128 weights of a row."""
