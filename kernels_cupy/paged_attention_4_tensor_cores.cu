// Step 4: tensor cores.
//
// Changed from step 3: the G query heads that share a KV head are the rows of a matrix, so K and V meet all of them
//   in one mma.m16n8k16 (rows past G are zero); K and V come by cp.async through a ring in shared memory, so a warp
//   always has the next tile on its way while it computes this one; the rows of a tile lie swizzled, so ldmatrix has
//   no bank conflict.
// Who does what: a block takes one sequence, one KV head (up to 16 of its query heads) and one split of the tokens. Its warps take
//   the split's tiles of 16 tokens in turn, each with a ring of its own, so the loop holds no block barrier. At the
//   end they merge in shared memory.
//   Scores: S[head, token] = Q K^T, an A operand from registers, K's rows through ldmatrix as they lie.
//   Output: O[head, dim] = P V, where P is S's accumulator packed in place: the layouts of D and A agree. V through
//   ldmatrix.trans. The sum of weights is one more mma, against ones.
// Bytes per output row of D values: 4 * D * context / G of K and V, once; splits add 4 * (D + 1) each.
// Expected limiter: DRAM bandwidth. Per tile (64 * D bytes) a warp issues D / 4 + 1 mma, D / 8 ldmatrix, D / 8 cp.async.
// Where it loses: G = 1 uses 1 of 16 rows (the mma count is the same); short or ragged batches leave splits uneven,
//   which step 5 mends; over 16 heads a KV head, K and V are read once per 16.
// Launch: grid (num_kv_heads * ceil(G / 16), num_splits, num_seqs), 32 * WARPS threads,
//   WARPS * STAGES * 64 * HEAD_DIM bytes of shared memory; then merge_splits (merge.cuh) if num_splits > 1.
#include "tiles.cuh"
#include "merge.cuh"

constexpr int WARPS = HEAD_DIM > 128 ? 2 : 4;
constexpr int STAGES = HEAD_DIM <= 80 ? 3 : 2;
constexpr int HALVES = GROUP > 8 ? 2 : 1;          // of the mma's 16 rows that hold query heads
constexpr int HEAD_TILES = (GROUP + 15) / 16;
constexpr int MERGE_STRIDE = HEAD_DIM + 8;         // floats; the 8 spread a warp's stores over all banks
static_assert(STAGES * 2 * TILE * 2 >= 8 * HALVES * (MERGE_STRIDE + 2) * 4, "the merge reuses a warp's ring");

struct Rows {  // of this lane: rows lane / 4 and lane / 4 + 8, spread as mma's D
    float out[2 * STEPS][4];
    float sum[4];          // every lane of a row holds its sum of weights, in [0] and [2]
    float max[2];          // of the raw scores
};

// Q as A operand, from global memory: no other warp layout ever needs it. Rows past the head count stay zero.
__device__ __forceinline__ void load_queries(unsigned (&q_frag)[STEPS][4], const scalar_t* q, int heads, int lane) {
    int group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = group + i % 2 * 8, column = step * 16 + i / 2 * 8 + pair;
            q_frag[step][i] = 0;
            if (i % 2 < HALVES && row < heads) q_frag[step][i] = *(const unsigned*)(q + row * HEAD_DIM + column);
        }
}

// Raw scores to weights 2^((s - max) * scale), in place; earlier output is scaled down if a maximum rose.
__device__ __forceinline__ void softmax_step(float (&score)[2][4], Rows& rows, float scale) {
    float correction[2] = {1, 1};
    bool rose = false;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        float top = fmaxf(fmaxf(score[0][2 * h], score[0][2 * h + 1]), fmaxf(score[1][2 * h], score[1][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
        top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
        top = fmaxf(top, rows.max[h]);
        rose |= top > rows.max[h];
        correction[h] = exp2f((rows.max[h] - top) * scale);
        rows.max[h] = top;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; e++) score[j][e] = exp2f(fmaf(score[j][e], scale, -top * scale));
    }
    if (!__any_sync(ALL, rose)) return;  // the usual case once a few tiles are through
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        rows.sum[2 * h] *= correction[h];
#pragma unroll
        for (int j = 0; j < 2 * STEPS; j++) rows.out[j][2 * h] *= correction[h], rows.out[j][2 * h + 1] *= correction[h];
    }
}

// One tile of up to 16 tokens meets the query rows.
__device__ __forceinline__ void attend(Rows& rows, const unsigned (&q_frag)[STEPS][4], const scalar_t* k_tile,
                                       const scalar_t* v_tile, int tokens, int flip, float scale, int lane) {
    float score[2][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        unsigned k[4];
        load_matrices(k, corner(k_tile, step, lane, false));
        multiply_add(score[0], q_frag[step], k);
        multiply_add(score[1], q_frag[step], k + 2);
    }
    if (tokens < TOKENS) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int token = (i / 4 * 8 + lane % 4 * 2 + i % 2) ^ flip;
            if (token >= tokens) score[i / 4][i % 4] = MASKED;
        }
    }
    softmax_step(score, rows, scale);
    unsigned weights[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i % 2 < HALVES) weights[i] = pack(score[i / 2][i % 2 * 2], score[i / 2][i % 2 * 2 + 1]);
    const unsigned ones[2] = {ONES, ONES};
    multiply_add(rows.sum, weights, ones);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        unsigned v[4];
        load_matrices_trans(v, corner(v_tile, step, lane, true));
        multiply_add(rows.out[2 * step], weights, v);
        multiply_add(rows.out[2 * step + 1], weights, v + 2);
    }
}

// Leaves this warp's rows in its own ring: outputs not yet divided, then the sum and the maximum of each row.
__device__ __forceinline__ void store_rows(float* mine, const Rows& rows, int lane) {
    int group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        float* row = mine + (group + 8 * h) * MERGE_STRIDE;
#pragma unroll
        for (int j = 0; j < 2 * STEPS; j++)
            *(float2*)(row + j * 8 + pair) = make_float2(rows.out[j][2 * h], rows.out[j][2 * h + 1]);
        if (pair == 0) *(float2*)(row + HEAD_DIM) = make_float2(rows.sum[2 * h], rows.max[h]);
    }
}

// All threads of the block: the warps' rows, weighed by their maxima, to `out` or to this split's piece.
__device__ __forceinline__ void merge_warps(const float* ring, int ring_stride, int heads, float scale, scalar_t* out,
                                            float* workspace, int row, int rows, int split, int num_splits) {
    for (int i = threadIdx.x; i < heads * HEAD_DIM; i += 32 * WARPS) {
        int head = i / HEAD_DIM, d = i % HEAD_DIM;
        const float* one = ring + head * MERGE_STRIDE;
        float top = NO_SCORE, value = 0, sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, one[w * ring_stride + HEAD_DIM + 1]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float weight = exp2f((one[w * ring_stride + HEAD_DIM + 1] - top) * scale);
            value += weight * one[w * ring_stride + d];
            sum += weight * one[w * ring_stride + HEAD_DIM];
        }
        if (num_splits == 1) {
            out[(long long)(row + head) * HEAD_DIM + d] = from_float(value / sum);
        } else {
            piece_output(workspace, row + head, split, num_splits)[d] = value / sum;
            if (d == 0) *piece_log(workspace, rows, row + head, split, num_splits) = log2f(sum) + top * scale;
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) paged_attention(
    const scalar_t* q, const scalar_t* k_cache, const scalar_t* v_cache, const int* block_tables,
    const int* context_lens, const int* reversed, scalar_t* out, float* workspace, float scale, int num_seqs,
    int max_blocks, int num_splits) {
    extern __shared__ uint4 shared[];
    constexpr int RING = STAGES * 2 * TILE;  // values of one warp's ring
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int kv_head = blockIdx.x / HEAD_TILES, first_head = blockIdx.x % HEAD_TILES * 16;
    int split = blockIdx.y, seq = blockIdx.z;
    int heads = min(16, GROUP - first_head), row = seq * NUM_HEADS + kv_head * GROUP + first_head;
    Sequence s = {block_tables + (long long)seq * max_blocks, context_lens[seq], reversed[seq] ? 15 : 0};

    // 1. This split's tiles, and of those every WARPS-th.
    int tiles = (s.length + TOKENS - 1) / TOKENS, share = (tiles + num_splits - 1) / num_splits;
    int begin = split * share, end = min(begin + share, tiles);
    if (begin >= end) {  // more splits than tiles
        if (num_splits > 1 && threadIdx.x < heads)
            *piece_log(workspace, num_seqs * NUM_HEADS, row + threadIdx.x, split, num_splits) = NO_SCORE;
        return;
    }
    scalar_t* ring = (scalar_t*)shared + warp * RING;
    auto load = [&](int tile, int stage) {
        if (tile < end) {
            long long offset = tile_offset(s, tile, kv_head);
            scalar_t* k_tile = ring + stage * 2 * TILE;
            load_tile<32>(k_tile, k_cache + offset, s.length - tile * TOKENS, s.flip, lane);
            load_tile<32>(k_tile + TILE, v_cache + offset, s.length - tile * TOKENS, s.flip, lane);
        }
        copy_commit();  // an empty group keeps the count of groups in step
    };

    // 2. Fill the ring, then one tile in, one tile out.
    for (int i = 0; i < STAGES - 1; i++) load(begin + warp + i * WARPS, i);
    unsigned q_frag[STEPS][4];
    load_queries(q_frag, q + (long long)row * HEAD_DIM, heads, lane);
    scale *= LOG2_E;
    Rows rows = {};
    rows.max[0] = rows.max[1] = NO_SCORE;
    int stage = 0;
    for (int tile = begin + warp; tile < end; tile += WARPS) {
        copy_wait<STAGES - 2>();
        __syncwarp();  // every lane's copies have landed, and every lane is done with the stage that is loaded next
        load(tile + (STAGES - 1) * WARPS, stage == 0 ? STAGES - 1 : stage - 1);
        const scalar_t* k_tile = ring + stage * 2 * TILE;
        attend(rows, q_frag, k_tile, k_tile + TILE, s.length - tile * TOKENS, s.flip, scale, lane);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    // 3. The warps' parts become one.
    copy_wait<0>();
    __syncwarp();  // the ring is this warp's own: it may be overwritten once every lane has read its last tile
    store_rows((float*)ring, rows, lane);
    __syncthreads();
    merge_warps((const float*)shared, RING / 2, heads, scale, out, workspace, row, num_seqs * NUM_HEADS, split,
                num_splits);
}
