// Step 0: one thread per query head.
//
// Who does what: a thread walks all tokens of its sequence, with an online softmax: the running maximum `top`, the sum
//   of weights, and the output so far, which fades by 2^(old top - new top) whenever the maximum rises.
// Bytes per output row of D values: 4 * D * context of K and V in fp16, by every query head of a group again.
// Expected limiter: latency. Neighbouring threads read rows that lie apart, so each 32-byte sector serves one value at
//   a time; there are as many threads as heads, and a GPU wants a hundred times more.
// Where it loses: everywhere. It is the one to read first. The output is kept in registers: HEAD_DIM up to 128.
// Launch: ceil(num_seqs * NUM_HEADS / 64) blocks of 64 threads; num_splits is ignored.
#include "paged.cuh"

extern "C" __global__ void paged_attention(
    const scalar_t* q, const scalar_t* k_cache, const scalar_t* v_cache, const int* block_tables,
    const int* context_lens, const int* reversed, scalar_t* out, float* workspace, float scale, int num_seqs,
    int max_blocks, int num_splits) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= num_seqs * NUM_HEADS) return;
    int seq = row / NUM_HEADS, kv_head = row % NUM_HEADS / GROUP;
    q += (long long)row * HEAD_DIM;
    scale *= LOG2_E;

    float total[HEAD_DIM] = {}, top = NO_SCORE, sum = 0;
    for (int position = 0; position < context_lens[seq]; position++) {
        long long kv = row_of(block_tables + (long long)seq * max_blocks, position, reversed[seq], kv_head);
        float score = 0;
        for (int d = 0; d < HEAD_DIM; d++) score += to_float(q[d]) * to_float(k_cache[kv + d]);
        score *= scale;
        float new_top = fmaxf(top, score), fade = exp2f(top - new_top), weight = exp2f(score - new_top);
#pragma unroll
        for (int d = 0; d < HEAD_DIM; d++) total[d] = total[d] * fade + weight * to_float(v_cache[kv + d]);
        sum = sum * fade + weight;
        top = new_top;
    }
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d++) out[(long long)row * HEAD_DIM + d] = from_float(total[d] / sum);
}
