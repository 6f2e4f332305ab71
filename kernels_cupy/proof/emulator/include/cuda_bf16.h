// bfloat16 and its pair, in place of CUDA's header: conversions, round to nearest even.
#pragma once

extern "C" __attribute__((const)) unsigned short emu_float_to_bfloat16(float value);

struct __align__(2) __nv_bfloat16 { unsigned short bits; };
struct __align__(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

EMU_INLINE float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float((unsigned)h.bits << 16); }
EMU_INLINE __nv_bfloat16 __float2bfloat16(float f) { return {emu_float_to_bfloat16(f)}; }
EMU_INLINE __nv_bfloat16 __float2bfloat16_rn(float f) { return {emu_float_to_bfloat16(f)}; }
EMU_INLINE __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
EMU_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 f) { return __floats2bfloat162_rn(f.x, f.y); }
EMU_INLINE __nv_bfloat162 __float2bfloat162_rn(float f) { return __floats2bfloat162_rn(f, f); }
EMU_INLINE float2 __bfloat1622float2(__nv_bfloat162 h) { return {__bfloat162float(h.x), __bfloat162float(h.y)}; }
EMU_INLINE float __low2float(__nv_bfloat162 h) { return __bfloat162float(h.x); }
EMU_INLINE float __high2float(__nv_bfloat162 h) { return __bfloat162float(h.y); }
EMU_INLINE __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
EMU_INLINE __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
EMU_INLINE unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
