// The inner activation of a gated MLP: silu(gate) * up, with silu(x) = x / (1 + exp(-x)).
//
// gate_up [T, 2 * INNER]: the gates of a row, then its ups; out [T, INNER].
// Who does what: a thread takes 16 bytes of gate and the same 16 bytes of up. Arithmetic is float, rounded once.
// Bytes: each value is read or written once. Limiter: launch latency for a few rows, DRAM bandwidth for many.
// Launch: ceil(T * INNER / VECTOR / 256) blocks of 256 threads. INNER is a whole number of 16-byte pieces.
#include "common.cuh"

constexpr int VECTOR = 16 / sizeof(scalar_t);
constexpr int PIECES = INNER / VECTOR;  // of a row of the output
constexpr float LOG2_E = 1.4426950408889634f;
static_assert(INNER % VECTOR == 0, "rows are whole 16-byte pieces");

union Piece {
    uint4 bits;
    scalar_t values[VECTOR];
    __device__ Piece() {}
};

extern "C" __global__ void __launch_bounds__(256) silu_mul(const uint4* gate_up, uint4* out, int num_rows) {
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= num_rows * PIECES) return;
    long long from = (long long)(i / PIECES) * 2 * PIECES + i % PIECES;
    Piece gate, up, product;
    gate.bits = gate_up[from];
    up.bits = gate_up[from + PIECES];
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {
        float x = to_float(gate.values[j]);
        product.values[j] = from_float(x / (1 + exp2f(-x * LOG2_E)) * to_float(up.values[j]));
    }
    out[i] = product.bits;
}
