// half and half2, in place of CUDA's header: the conversions and the few operations that kernels here may use.
// Arithmetic is done in float and rounded, which is what the GPU's fp16 units give for one operation.
#pragma once

extern "C" __attribute__((const)) float emu_half_to_float(unsigned short bits);
extern "C" __attribute__((const)) unsigned short emu_float_to_half(float value);

struct __align__(2) __half { unsigned short bits; };
struct __align__(4) __half2 { __half x, y; };
typedef __half half;
typedef __half2 half2;

EMU_INLINE float __half2float(__half h) { return emu_half_to_float(h.bits); }
EMU_INLINE __half __float2half(float f) { return {emu_float_to_half(f)}; }
EMU_INLINE __half __float2half_rn(float f) { return {emu_float_to_half(f)}; }
EMU_INLINE __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
EMU_INLINE __half2 __float22half2_rn(float2 f) { return __floats2half2_rn(f.x, f.y); }
EMU_INLINE __half2 __float2half2_rn(float f) { return __floats2half2_rn(f, f); }
EMU_INLINE float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
EMU_INLINE float __low2float(__half2 h) { return __half2float(h.x); }
EMU_INLINE float __high2float(__half2 h) { return __half2float(h.y); }
EMU_INLINE __half __low2half(__half2 h) { return h.x; }
EMU_INLINE __half __high2half(__half2 h) { return h.y; }
EMU_INLINE __half2 __halves2half2(__half x, __half y) { return {x, y}; }
EMU_INLINE __half2 make_half2(__half x, __half y) { return {x, y}; }
EMU_INLINE __half __ushort_as_half(unsigned short bits) { return {bits}; }
EMU_INLINE unsigned short __half_as_ushort(__half h) { return h.bits; }
EMU_INLINE __half __hadd(__half a, __half b) { return __float2half(__half2float(a) + __half2float(b)); }
EMU_INLINE __half __hmul(__half a, __half b) { return __float2half(__half2float(a) * __half2float(b)); }
EMU_INLINE __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
EMU_INLINE __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
