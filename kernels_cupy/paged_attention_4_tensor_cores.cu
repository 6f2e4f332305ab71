// Step 4: tensor cores.
//
// Changed from step 3: the G query heads that share a KV head are the rows of a matrix, so K and V meet all of them
//   in one mma.m16n8k16 (rows past G are zero); K and V come by cp.async through a ring in shared memory, so a warp
//   always has the next tile on its way while it computes this one; the rows of a tile lie swizzled, so ldmatrix has
//   no bank conflict.
// Who does what: a block takes one sequence, one KV head (up to 16 of its query heads) and one split of the tokens. Its warps take
//   the split's tiles of 16 tokens in turn, each with a ring of its own, so the loop holds no block barrier. At the
//   end they merge in shared memory.
// Bytes per output row of D values: 4 * D * context / G of K and V, once; splits add 4 * (D + 1) each.
// Expected limiter: DRAM bandwidth. Per tile (64 * D bytes) a warp issues D / 4 + 1 mma, D / 8 ldmatrix, D / 8 cp.async.
// Where it loses: G = 1 uses 1 of 16 rows (the mma count is the same); short or ragged batches leave splits uneven,
//   which step 5 fixes; with over 16 query heads per KV head, K and V are read once per 16.
// Launch: grid (num_kv_heads * ceil(G / 16), num_splits, num_seqs), 32 * WARPS threads,
//   WARPS * STAGES * 64 * HEAD_DIM bytes of shared memory (HEAD_DIM > 128: and WARPS * 32 * HEAD_DIM for Q); then merge_splits (merge.cuh) if num_splits > 1.
#include "query_rows.cuh"
#include "merge.cuh"

constexpr int WARPS = HEAD_DIM > 128 ? 2 : 4;
constexpr int STAGES = HEAD_DIM <= 80 ? 3 : 2;
constexpr int HALVES = GROUP > 8 ? 2 : 1;          // of the mma's 16 rows that hold query heads
constexpr int HEAD_TILES = (GROUP + 15) / 16;
constexpr int MERGE_STRIDE = HEAD_DIM + 8;         // floats; the 8 spread a warp's stores over all banks
static_assert(STAGES * 2 * TILE * 2 >= 8 * HALVES * (MERGE_STRIDE + 2) * 4, "the merge reuses a warp's ring");

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

// Three blocks of a multiprocessor leave 168 registers for a thread, which is enough; left alone, the compiler takes a
// few more. sm_75 has shared memory for one block only at HEAD_DIM 128, and would spill for nothing.
#if __CUDA_ARCH__ >= 800
constexpr int MIN_BLOCKS = HEAD_DIM <= 128 ? 3 : 1;
#else
constexpr int MIN_BLOCKS = 1;
#endif
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) paged_attention(
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
    const int mine = kv_head * HEAD_DIM + thread_offset<32>(lane);
    k_cache += mine, v_cache += mine;
    auto load = [&](int tile, int stage) {
        if (tile < end) {
            long long offset = tile_offset(s, tile);
            scalar_t* k_tile = ring + stage * 2 * TILE;
            load_tile<32>(k_tile, TILE, k_cache + offset, v_cache + offset, s.length - tile * TOKENS, s.flip, lane);
        }
        copy_commit();  // an empty group keeps the count of groups in step
    };

    // 2. Fill the ring, then one tile in, one tile out.
    for (int i = 0; i < STAGES - 1; i++) load(begin + warp + i * WARPS, i);
    Queries queries[ROW_TILES];
    load_queries(queries[0], (scalar_t*)shared + WARPS * RING + warp * TILE, lane, [&](int i) {
        return i < heads ? q + (long long)(row + i) * HEAD_DIM : nullptr; });
    scale *= LOG2_E;
    Rows rows[ROW_TILES] = {};
    rows[0].max[0] = rows[0].max[1] = NO_SCORE;
    int stage = 0;
    for (int tile = begin + warp; tile < end; tile += WARPS) {
        copy_wait<STAGES - 2>();
        __syncwarp();  // every lane's copies have landed, and every lane is done with the stage that is loaded next
        load(tile + (STAGES - 1) * WARPS, stage == 0 ? STAGES - 1 : stage - 1);
        const scalar_t* k_tile = ring + stage * 2 * TILE;
        int tokens = s.length - tile * TOKENS;
        attend<HALVES, 1>(rows, queries, k_tile, k_tile + TILE, scale, lane, tokens < TOKENS,
                          [&](int, int token, int) { return (token ^ s.flip) >= tokens; });
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    // 3. The warps' parts become one.
    copy_wait<0>();
    __syncwarp();  // the ring is this warp's own: it may be overwritten once every lane has read its last tile
    store_rows((float*)ring, rows[0], lane);
    __syncthreads();
    merge_warps((const float*)shared, RING / 2, heads, scale, out, workspace, row, num_seqs * NUM_HEADS, split,
                num_splits);
}
