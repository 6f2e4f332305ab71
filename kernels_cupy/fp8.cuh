// An fp8 KV cache: float8 e4m3fn (a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, largest 448).
//
// Decoding gives x * 2^-8. Shifted into place, a byte's seven bits are those of a half, whose exponent has the bias 15:
// that half is exactly x * 2^-8, subnormal numbers included. Nothing is looked up, and two bytes of a register are
// decoded at once. The factor 2^8 is part of the scales that a launcher passes, so it costs no instruction. The NaNs
// 0x7f and 0xff become 480 and -480 times 2^-8: finite, so that a weight of 0 cancels them.
// Encoding rounds once to nearest even, and numbers beyond 448 become 448. It needs no special instruction either, so
// both run on sm_75 too.
#pragma once
#include <cuda_fp16.h>

// Bytes 0 and 2 of a register, and bytes 1 and 3, as two halves each, the first one low.
__device__ __forceinline__ unsigned even_halves(unsigned bytes) {
    return (bytes << 8 & 0x80008000u) | (bytes << 7 & 0x3f803f80u);
}
__device__ __forceinline__ unsigned odd_halves(unsigned bytes) {
    return (bytes & 0x80008000u) | (bytes >> 1 & 0x3f803f80u);
}
__device__ __forceinline__ float2 to_floats(unsigned halves) { return __half22float2(*(const __half2*)&halves); }

__device__ __forceinline__ float to_float(unsigned char byte) { return to_floats(even_halves(byte)).x; }

// The four bytes of a register in order.
__device__ __forceinline__ void decode(unsigned bytes, float* values) {
    float2 even = to_floats(even_halves(bytes)), odd = to_floats(odd_halves(bytes));
    values[0] = even.x, values[1] = odd.x, values[2] = even.y, values[3] = odd.y;
}

// The nearest byte. From 2^e on (and below 2^-6, the smallest normal number, as if from there on) e4m3 numbers are
// 2^(e-3) apart, which is the distance of floats from 2^(e+20) on: adding that number rounds x to a multiple of it.
__device__ __forceinline__ unsigned encode(float x) {
    unsigned bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
    float size = fminf(fabsf(x), 448.0f);
    unsigned exponent = max(__float_as_uint(size) >> 23, 127u - 6), anchor = (exponent + 20) << 23;
    unsigned steps = __float_as_uint(size + __uint_as_float(anchor)) - anchor;
    return sign | (x == x ? ((exponent - (127 - 6)) << 3) + steps : 0x7f);
}
