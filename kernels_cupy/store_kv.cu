// New rows of K and V to their slots. Slots are physical, so both directions are the same to it.
//
// Who does what: a thread copies 16 bytes of K and the same 16 bytes of V. Neighbouring threads take neighbouring
//   pieces of a row, so loads and stores are whole sectors.
// Bytes: each row once in, once out. Limiter: launch latency for a few tokens, DRAM bandwidth for a long prefill.
// fp8 cache: a value is divided by its scale and rounded once (fp8.cuh); a piece of 16 bytes becomes 8, or 4 of floats.
// Launch: ceil(num_tokens * ROW_VECTORS / 256) blocks of 256 threads. ROW_VECTORS is -D: 16-byte pieces of one new
//   token's row of all KV heads. No slot may occur twice.

#include "common.cuh"

#if KV_FP8
constexpr int VECTOR = 16 / sizeof(scalar_t);
struct __align__(VECTOR) Stored { unsigned words[VECTOR / 4]; };

__device__ __forceinline__ Stored stored(uint4 piece, float scale) {
    const scalar_t* values = (const scalar_t*)&piece;
    Stored bytes = {};
#pragma unroll
    for (int i = 0; i < VECTOR; i++) bytes.words[i / 4] |= encode(to_float(values[i]) / scale) << (i % 4 * 8);
    return bytes;
}
#else
typedef uint4 Stored;
__device__ __forceinline__ Stored stored(uint4 piece, float) { return piece; }
#endif

extern "C" __global__ void store_kv(const uint4* k, const uint4* v, const int* slot_mapping, Stored* k_cache,
                                    Stored* v_cache, int num_tokens SCALE_PARAMETERS) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_tokens * ROW_VECTORS) return;
    long long to = (long long)slot_mapping[i / ROW_VECTORS] * ROW_VECTORS + i % ROW_VECTORS;
    k_cache[to] = stored(k[i], k_scale);
    v_cache[to] = stored(v[i], v_scale);
}
