// What the scalar decode kernels (steps 0 to 3) share: where a token's row lies, and a warp's sum.
#pragma once
#include "common.cuh"

constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;  // query heads that share a KV head
constexpr float LOG2_E = 1.4426950408889634f;    // weights are powers of two: exp2f is one instruction
constexpr float NO_SCORE = -1e30f;               // below every score, and finite: no NaN from inf - inf

// First value of the row of a token in k_cache and v_cache, [num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM].
// An RT sequence fills its blocks from the left, a BE sequence (reversed) from the right.
__device__ __forceinline__ long long row_of(const int* block_table, int position, int reversed, int kv_head) {
    int offset = position % BLOCK_SIZE;
    long long slot = (long long)block_table[position / BLOCK_SIZE] * BLOCK_SIZE
        + (reversed ? BLOCK_SIZE - 1 - offset : offset);
    return (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM;
}

// The sum of x over LANES neighbouring lanes, to all of them. LANES is a power of two.
template <int LANES> __device__ __forceinline__ float sum_over(float x) {
#pragma unroll
    for (int other = LANES / 2; other; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}
