// What every kernel shares: the element type, and which physical slot a token's row has.
// scalar_t is chosen with -DSCALAR=0 (float), 1 (half) or 2 (bfloat16); arithmetic is always float.
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
