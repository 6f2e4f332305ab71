// What every kernel shares: the element type, and which physical slot a token's row has.
// scalar_t is chosen with -DSCALAR=0 (float), 1 (half) or 2 (bfloat16); arithmetic is always float.
// cache_t is the element of the KV cache: scalar_t, or with -DKV_FP8=1 a byte (fp8.cuh). A kernel that reads an fp8 cache
// has one more parameter, the factor of its output, and one that stores has two, what it divides by; for other caches
// they are the constant 1, which costs nothing.
#pragma once

#if SCALAR == 1
#include <cuda_fp16.h>
typedef __half scalar_t;
__device__ __forceinline__ float to_float(scalar_t x) { return __half2float(x); }
__device__ __forceinline__ scalar_t from_float(float x) { return __float2half(x); }
#elif SCALAR == 2
#include <cuda_bf16.h>
typedef __nv_bfloat16 scalar_t;
__device__ __forceinline__ float to_float(scalar_t x) { return __bfloat162float(x); }
__device__ __forceinline__ scalar_t from_float(float x) { return __float2bfloat16(x); }
#else
typedef float scalar_t;
__device__ __forceinline__ float to_float(scalar_t x) { return x; }
__device__ __forceinline__ scalar_t from_float(float x) { return x; }
#endif

#if KV_FP8
#include "fp8.cuh"
typedef unsigned char cache_t;
#define V_SCALE_PARAMETER , float v_scale
#define SCALE_PARAMETERS , float k_scale, float v_scale
#else
typedef scalar_t cache_t;
#define V_SCALE_PARAMETER
#define SCALE_PARAMETERS
constexpr float k_scale = 1, v_scale = 1;
#endif
