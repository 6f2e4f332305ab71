// Between two sublayers: adds one's output to the residual stream, and normalises the sum for the next one's input.
//
//     residual += delta,   out = residual / sqrt(mean(residual^2) + eps) * weight      (RMS norm, per row)
//
// Without ADD (before the first layer) there is no delta, and the residual is read but not written.
// Who does what: a block takes one row. A thread takes every THREADS-th piece of 16 bytes and keeps it in registers
//   between the two steps. The sum is rounded to the element type before it is normalised, as in the stored residual.
// Bytes: residual read and written, delta read, out written, once each; weight from the L2 cache. Limiter: launch
//   latency for a few rows, DRAM bandwidth for many.
// Launch: a block of THREADS threads per row. A row has HIDDEN values, a whole number of pieces.
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int VECTOR = 16 / sizeof(scalar_t);
constexpr int PIECES = HIDDEN / VECTOR;
constexpr int PER_THREAD = (PIECES + THREADS - 1) / THREADS;
static_assert(HIDDEN % VECTOR == 0, "rows are whole 16-byte pieces");

union Piece {
    uint4 bits;
    scalar_t values[VECTOR];
    __device__ Piece() {}
};

extern "C" __global__ void __launch_bounds__(THREADS) add_norm(scalar_t* residual, const scalar_t* delta,
                                                               const scalar_t* weight, scalar_t* out, float eps) {
    __shared__ float sums[WARPS];
    long long row = (long long)blockIdx.x * PIECES;

    // 1. The sum, and the sum of its squares.
    Piece sum[PER_THREAD];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        int piece = threadIdx.x + i * THREADS;
        if (piece >= PIECES) continue;
        sum[i].bits = ((const uint4*)residual)[row + piece];
#if ADD
        Piece more;
        more.bits = ((const uint4*)delta)[row + piece];
#pragma unroll
        for (int j = 0; j < VECTOR; j++)
            sum[i].values[j] = from_float(to_float(sum[i].values[j]) + to_float(more.values[j]));
        ((uint4*)residual)[row + piece] = sum[i].bits;
#endif
#pragma unroll
        for (int j = 0; j < VECTOR; j++) squares += to_float(sum[i].values[j]) * to_float(sum[i].values[j]);
    }

    // 2. Over all threads, in the same order in each of them.
#pragma unroll
    for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += sums[w];
    float scale = rsqrtf(total / HIDDEN + eps);

    // 3. The next input.
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        int piece = threadIdx.x + i * THREADS;
        if (piece >= PIECES) continue;
        Piece by, normed;
        by.bits = ((const uint4*)weight)[piece];
#pragma unroll
        for (int j = 0; j < VECTOR; j++)
            normed.values[j] = from_float(to_float(sum[i].values[j]) * scale * to_float(by.values[j]));
        ((uint4*)out)[row + piece] = normed.bits;
    }
}
