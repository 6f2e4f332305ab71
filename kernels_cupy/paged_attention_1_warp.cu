// Step 1: one warp per query head.
//
// Changed from step 0: the 32 lanes of a warp share a row, lane l holding dimensions l, l + 32, ... So a row is read by
//   neighbouring lanes at once and its sectors are used whole, and there are 32 times more threads. The score is a sum
//   over lanes: five shuffles per token.
// Bytes per output row: as step 0, but every sector is read once per warp.
// Expected limiter: latency and instructions: two loads and five shuffles for each token, one token at a time.
// Where it loses: the G heads of a group read the same K and V again; a long context runs on one warp.
// Launch: ceil(num_seqs * NUM_HEADS / 4) blocks of 4 warps; num_splits is ignored.
#include "paged.cuh"

constexpr int PER_LANE = (HEAD_DIM + 31) / 32;

extern "C" __global__ void paged_attention(
    const scalar_t* q, const scalar_t* k_cache, const scalar_t* v_cache, const int* block_tables,
    const int* context_lens, const int* reversed, scalar_t* out, float* workspace, float scale, int num_seqs,
    int max_blocks, int num_splits) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= num_seqs * NUM_HEADS) return;  // whole warps leave, so the shuffles below are complete
    int seq = row / NUM_HEADS, kv_head = row % NUM_HEADS / GROUP;
    float query[PER_LANE], total[PER_LANE] = {}, top = NO_SCORE, sum = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int d = lane + 32 * i;
        query[i] = d < HEAD_DIM ? to_float(q[(long long)row * HEAD_DIM + d]) * scale * LOG2_E : 0;
    }
    for (int position = 0; position < context_lens[seq]; position++) {
        long long kv = row_of(block_tables + (long long)seq * max_blocks, position, reversed[seq], kv_head);
        float score = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int d = lane + 32 * i;
            if (d < HEAD_DIM) score += query[i] * to_float(k_cache[kv + d]);
        }
        score = sum_over<32>(score);
        float new_top = fmaxf(top, score), fade = exp2f(top - new_top), weight = exp2f(score - new_top);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int d = lane + 32 * i;
            if (d < HEAD_DIM) total[i] = total[i] * fade + weight * to_float(v_cache[kv + d]);
        }
        sum = sum * fade + weight;
        top = new_top;
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int d = lane + 32 * i;
        if (d < HEAD_DIM) out[(long long)row * HEAD_DIM + d] = from_float(total[i] / sum);
    }
}
