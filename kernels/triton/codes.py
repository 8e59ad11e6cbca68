"""Codes of weights → bf16 numbers, four codes of a word at a time.

The codes of a weight are taken apart in each call anew, and what that takes is issued as fast as memory brings them:
an H200 reads 19 bytes in a turn of a multiprocessor, which issues 128 instructions of single threads meanwhile. Integer
arithmetic of single codes took 7 of them; by words e4m3 takes 2.5 a code, eight bits 1 and four bits 1.25.

A whole number c put into the low bits of a bf16 is c·2^-133: subnormal up to 127, and the numbers behind it go on in
the same steps up to 255. One multiply-add in bf16, which rounds nothing here, makes (c - zero)/64 of it. Sums of
products are multiplied by 64 then, with their scale: a power of two changes no bit.
"""

import triton.language as tl

from tmlc.kernels.triton.mode import COMPILED, device

#: What `whole_values` and `half_values` have to be multiplied by. 2^133 / 64 is the largest power of two in bf16.
STEP = tl.constexpr(64.0)

# Each byte goes to the high half of 16 bits, exponent and mantissa four bits down, where a bf16 has them, and what is
# read there is 2^120 too small.
_FP8 = tl.constexpr(
    """{
.reg .b32 code, much, none;
mov.b32 much, 0x7b807b80;
mov.b32 none, 0x80008000;
prmt.b32 code, $2, 0, 0x1404;
shr.b32 $0, code, 4;
and.b32 $0, $0, 0x07f007f0;
lop3.b32 $0, code, none, $0, 0xea;
fma.rn.bf16x2 $0, $0, much, none;
prmt.b32 code, $2, 0, 0x3424;
shr.b32 $1, code, 4;
and.b32 $1, $1, 0x07f007f0;
lop3.b32 $1, code, none, $1, 0xea;
fma.rn.bf16x2 $1, $1, much, none;
}"""
)

_BYTES = tl.constexpr(
    """{
.reg .b32 code, much, zero;
mov.b32 much, 0x7f007f00;
mov.b32 zero, 0xc000c000;
prmt.b32 code, $2, 0, 0x4140;
fma.rn.bf16x2 $0, code, much, zero;
prmt.b32 code, $2, 0, 0x4342;
fma.rn.bf16x2 $1, code, much, zero;
}"""
)

# The high half of a byte is 16 times as large.
_HALVES = tl.constexpr(
    """{
.reg .b32 code, part, much, less;
mov.b32 much, 0x7f007f00;
mov.b32 less, 0x7d007d00;
prmt.b32 code, $4, 0, 0x4140;
and.b32 part, code, 0x000f000f;
fma.rn.bf16x2 $0, part, much, $5;
and.b32 part, code, 0x00f000f0;
fma.rn.bf16x2 $2, part, less, $5;
prmt.b32 code, $4, 0, 0x4342;
and.b32 part, code, 0x000f000f;
fma.rn.bf16x2 $1, part, much, $6;
and.b32 part, code, 0x00f000f0;
fma.rn.bf16x2 $3, part, less, $6;
}"""
)


@device
def fp8_values(codes):
    """bf16 values of e4m3 codes (u8), exactly. Needs no fp8 instructions, so it runs on every architecture."""
    if COMPILED:
        values = tl.inline_asm_elementwise(_FP8, "=&r,=&r,r", [codes], tl.bfloat16, True, 4)
    else:
        wide = codes.to(tl.int32)
        magnitude = ((wide & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        values = tl.where(wide >= 128, -magnitude, magnitude).to(tl.bfloat16)
    return values


@device
def whole_values(codes):
    """(code - 128) / 64 of codes (u8) as bf16, exactly."""
    if COMPILED:
        values = tl.inline_asm_elementwise(_BYTES, "=&r,=&r,r", [codes], tl.bfloat16, True, 4)
    else:
        values = ((codes.to(tl.int32) - 128).to(tl.float32) / 64).to(tl.bfloat16)
    return values


@device
def half_values(codes, zero):
    """(code - zero/16) / 64 of the low and of the high halves of bytes (u8) as bf16, exactly; zero: u8, of the shape of
    `codes` in all but the last axis."""
    wide = tl.broadcast_to((zero.to(tl.float32) * -0.0009765625).to(tl.bfloat16)[:, :, None], codes.shape)
    if COMPILED:
        low, high = tl.inline_asm_elementwise(
            _HALVES, "=&r,=&r,=&r,=&r,r,r,r", [codes, wide], (tl.bfloat16, tl.bfloat16), True, 4
        )
    else:
        byte = codes.to(tl.int32)
        low = ((byte & 15).to(tl.float32) / 64 + wide.to(tl.float32)).to(tl.bfloat16)
        high = ((byte >> 4).to(tl.float32) / 64 + wide.to(tl.float32)).to(tl.bfloat16)
    return low, high
