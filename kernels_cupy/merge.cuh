// Split-KV: the partial result of each piece of a sequence, and how the pieces of a row are merged into its output.
//
// workspace: [S, H, num_splits, HEAD_DIM] float, each piece's output divided by its own sum of weights; then
//            [S, H, num_splits] float, the log2 of that sum (weights are powers of two), NO_SCORE for an empty piece,
//            whose output is never read.
// The merge is a softmax over those logs: out = sum_i 2^(log_i - max) * out_i / sum_i 2^(log_i - max).
#pragma once
#include "common.cuh"

__device__ __forceinline__ float* piece_output(float* workspace, int row, int split, int num_splits) {
    return workspace + ((long long)row * num_splits + split) * HEAD_DIM;
}
__device__ __forceinline__ float* piece_log(float* workspace, int rows, int row, int split, int num_splits) {
    return workspace + (long long)rows * num_splits * HEAD_DIM + (long long)row * num_splits + split;
}

// Grid (H, S), HEAD_DIM threads: thread d merges dimension d of one row. All threads read the same logs (one
// broadcast each), and neighbours read neighbouring outputs. Traffic: 4 * num_splits * (HEAD_DIM + 1) bytes a row.
extern "C" __global__ void merge_splits(const float* workspace, scalar_t* out, int num_seqs, int num_splits) {
    int rows = num_seqs * NUM_HEADS, row = blockIdx.y * NUM_HEADS + blockIdx.x, d = threadIdx.x;
    const float* logs = workspace + (long long)rows * num_splits * HEAD_DIM + (long long)row * num_splits;
    const float* outputs = workspace + (long long)row * num_splits * HEAD_DIM;
    float top = logs[0];
    for (int i = 1; i < num_splits; i++) top = fmaxf(top, logs[i]);
    float sum = 0, total = 0;
    for (int i = 0; i < num_splits; i++) {
        float weight = exp2f(logs[i] - top);
        if (weight == 0) continue;
        sum += weight * outputs[i * HEAD_DIM + d];
        total += weight;
    }
    out[(long long)row * HEAD_DIM + d] = from_float(sum / total);
}
