// Step 2: one block per query head, in two passes.
//
// Changed from step 1: four warps share a sequence, each taking every fourth token. All scores are kept in shared
//   memory, so the maximum is known before any weight is computed: pass one K, pass two V. This is the structure
//   of vLLM's first paged-attention kernel.
// Bytes per output row: as step 1. Shared memory: 4 bytes per token of the longest context, 16 KB for 4,096.
// Expected limiter: instructions, more than in step 1: scores travel through shared memory, and every pass has its own
//   loop; but four times as many loads are in flight.
// Where it loses: groups read K and V again; a context longer than shared memory does not fit (about 56,000 tokens on
//   sm_90, 12,000 without opting in to more); short contexts pay for two block-wide reductions.
// Launch: grid (NUM_HEADS, num_seqs), 4 warps, 4 * max_blocks * BLOCK_SIZE bytes of shared memory; num_splits is ignored.
#include "paged.cuh"

constexpr int WARPS = 4;
constexpr int PER_LANE = (HEAD_DIM + 31) / 32;

// Maximum (or sum) over the block, to all threads. `parts` is [WARPS]; two calls may use the same one.
template <bool MAXIMUM> __device__ __forceinline__ float reduce_block(float x, float* parts) {
#pragma unroll
    for (int other = 16; other; other /= 2) {
        float theirs = __shfl_xor_sync(0xffffffffu, x, other);
        x = MAXIMUM ? fmaxf(x, theirs) : x + theirs;
    }
    __syncthreads();  // whoever still reads parts from the call before is done
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) x = MAXIMUM ? fmaxf(x, parts[w]) : x + parts[w];
    return x;
}

extern "C" __global__ void paged_attention(
    const scalar_t* q, const scalar_t* k_cache, const scalar_t* v_cache, const int* block_tables,
    const int* context_lens, const int* reversed, scalar_t* out, float* workspace, float scale, int num_seqs,
    int max_blocks, int num_splits) {
    extern __shared__ float weights[];  // [context]: scores, then weights
    __shared__ float parts[WARPS], totals[WARPS][HEAD_DIM];
    int head = blockIdx.x, seq = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int length = context_lens[seq], flip = reversed[seq];
    long long row = (long long)seq * NUM_HEADS + head;
    block_tables += (long long)seq * max_blocks;

    // 1. Scores: a warp a token.
    float query[PER_LANE], top = NO_SCORE;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        query[i] = lane + 32 * i < HEAD_DIM ? to_float(q[row * HEAD_DIM + lane + 32 * i]) * scale * LOG2_E : 0;
    for (int position = warp; position < length; position += WARPS) {
        const scalar_t* key = k_cache + row_of(block_tables, position, flip, head / GROUP);
        float score = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (lane + 32 * i < HEAD_DIM) score += query[i] * to_float(key[lane + 32 * i]);
        score = sum_over<32>(score);
        if (lane == 0) weights[position] = score;
        top = fmaxf(top, score);
    }

    // 2. Softmax over the block.
    top = reduce_block<true>(top, parts);
    float sum = 0;
    for (int position = threadIdx.x; position < length; position += 32 * WARPS) {
        weights[position] = exp2f(weights[position] - top);
        sum += weights[position];
    }
    sum = reduce_block<false>(sum, parts);  // its barriers also publish the weights

    // 3. Weighted values: again a warp a token, then the warps' parts.
    float total[PER_LANE] = {};
    for (int position = warp; position < length; position += WARPS) {
        const scalar_t* value = v_cache + row_of(block_tables, position, flip, head / GROUP);
        float weight = weights[position];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (lane + 32 * i < HEAD_DIM) total[i] += weight * to_float(value[lane + 32 * i]);
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (lane + 32 * i < HEAD_DIM) totals[warp][lane + 32 * i] = total[i];
    __syncthreads();
    for (int d = threadIdx.x; d < HEAD_DIM; d += 32 * WARPS) {
        float x = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) x += totals[w][d];
        out[row * HEAD_DIM + d] = from_float(x / sum);
    }
}
