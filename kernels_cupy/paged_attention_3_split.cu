// Step 3: split-KV, 16-byte loads, the group in registers.
//
// Changed from step 2:
//   Group: the query heads that share a KV head are served together, so K and V are read once (once per 8 heads).
//   Loads: 16 bytes per lane (8 of fp8). LANES neighbouring lanes (a team) hold a row, and a warp reads several rows at once.
//   Split: a sequence's blocks are cut into num_splits pieces, one thread block each, merged by log-sum-exp
//     (merge.cuh), so that one long sequence fills the GPU. Online softmax again: one pass, nothing in shared memory.
//   Direction: slots are walked in physical order and the direction changes only the mask, so both directions issue
//     the same loads. The last block is walked whole; slots of others in it are not read.
// Bytes per output row of D values: 4 * D * context / G of K and V in fp16, once; pieces add 4 * (D + 1) each.
// Expected limiter: DRAM bandwidth on large batches; instructions (conversions and shuffles) for G = 8.
// Where it loses: multiplies run on the ordinary units: step 4 has a third of the instructions.
// Launch: grid (NUM_KV_HEADS * ceil(GROUP / 8), num_splits, num_seqs), 128 threads; then merge_splits if num_splits > 1.
#include "paged.cuh"
#include "merge.cuh"

constexpr int THREADS = 128;
constexpr int VECTOR = 16 / sizeof(scalar_t);  // values of one load
constexpr int VECTORS = HEAD_DIM / VECTOR;     // of one row
constexpr int LANES = VECTORS > 16 ? 32 : VECTORS > 8 ? 16 : VECTORS > 4 ? 8 : 4;
constexpr int PER_LANE = (VECTORS + LANES - 1) / LANES;
constexpr int TEAMS = THREADS / LANES;
constexpr int MAX_HEADS = HEAD_DIM > 128 ? 4 : 8;  // of one thread block; their queries and outputs are in registers
constexpr int HEADS = GROUP < MAX_HEADS ? GROUP : MAX_HEADS;
constexpr int HEAD_TILES = (GROUP + HEADS - 1) / HEADS;
constexpr bool POWER_OF_TWO = (BLOCK_SIZE & (BLOCK_SIZE - 1)) == 0;
static_assert(HEAD_DIM % VECTOR == 0, "rows are whole 16-byte pieces");

struct Row { float values[PER_LANE * VECTOR]; };  // a lane's share of a row

// Zeros where the row is not ours to read: 0 * NaN would be NaN, so it must not be loaded at all.
__device__ __forceinline__ Row load_row(const scalar_t* row, int lane, bool ours) {
    Row share;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int vector = lane + LANES * i;
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (ours && vector < VECTORS) bits = *(const uint4*)(row + vector * VECTOR);
        const scalar_t* values = (const scalar_t*)&bits;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) share.values[i * VECTOR + j] = to_float(values[j]);
    }
    return share;
}
#if KV_FP8
// The same of the cache. A lane takes as many values as of a query, which are fewer bytes: 16 of them would be more
// values than registers hold for 8 heads.
__device__ __forceinline__ Row load_row(const cache_t* row, int lane, bool ours) {
    struct __align__(VECTOR) Piece { unsigned words[VECTOR / 4]; };
    Row share;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int vector = lane + LANES * i;
        Piece piece = {};
        if (vector < VECTORS && ours) piece = *(const Piece*)(row + vector * VECTOR);
#pragma unroll
        for (int j = 0; j < VECTOR / 4; j++) decode(piece.words[j], share.values + i * VECTOR + 4 * j);
    }
    return share;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) paged_attention(
    const scalar_t* q, const cache_t* k_cache, const cache_t* v_cache, const int* block_tables,
    const int* context_lens, const int* reversed, scalar_t* out, float* workspace, float scale, int num_seqs,
    int max_blocks, int num_splits V_SCALE_PARAMETER) {
    __shared__ float totals[TEAMS][HEADS][HEAD_DIM], tops[TEAMS][HEADS], sums[TEAMS][HEADS];
    int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int kv_head = blockIdx.x / HEAD_TILES, first = blockIdx.x % HEAD_TILES * HEADS;
    int heads = min(HEADS, GROUP - first), split = blockIdx.y, seq = blockIdx.z;
    int length = context_lens[seq], row = seq * NUM_HEADS + kv_head * GROUP + first;
    int flip = reversed[seq] ? BLOCK_SIZE - 1 : 0;  // reversed: offset = flip - slot, an XOR if all its bits are set
    block_tables += (long long)seq * max_blocks;

    // 1. This split's blocks, as a range of slots.
    int blocks = (length + BLOCK_SIZE - 1) / BLOCK_SIZE, share = (blocks + num_splits - 1) / num_splits;
    int begin = min(split * share, blocks) * BLOCK_SIZE, end = min((split + 1) * share, blocks) * BLOCK_SIZE;

    // 2. A team a slot: scores of all heads, then their outputs.
    Row query[HEADS], total[HEADS] = {};
    float top[HEADS], sum[HEADS] = {};
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        query[h] = load_row(q + (long long)(row + h) * HEAD_DIM, lane, h < heads);
        top[h] = NO_SCORE;
    }
    scale *= LOG2_E;
    for (int i = begin + team; i - team < end; i += TEAMS) {  // all teams of a warp stay for its shuffles
        int slot = i % BLOCK_SIZE, offset = POWER_OF_TWO ? slot ^ flip : flip ? flip - slot : slot;
        bool ours = i < end && i - slot + offset < length;
        long long kv = 0;
        if (ours) kv = (((long long)block_tables[i / BLOCK_SIZE] * BLOCK_SIZE + slot) * NUM_KV_HEADS + kv_head) * HEAD_DIM;
        Row key = load_row(k_cache + kv, lane, ours), value = load_row(v_cache + kv, lane, ours);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score = 0;
#pragma unroll
            for (int j = 0; j < PER_LANE * VECTOR; j++) score += query[h].values[j] * key.values[j];
            score = sum_over<LANES>(score) * scale;
            float new_top = ours ? fmaxf(top[h], score) : top[h];
            float fade = exp2f(top[h] - new_top), weight = ours ? exp2f(score - new_top) : 0;
#pragma unroll
            for (int j = 0; j < PER_LANE * VECTOR; j++)
                total[h].values[j] = total[h].values[j] * fade + weight * value.values[j];
            sum[h] = sum[h] * fade + weight;
            top[h] = new_top;
        }
    }

    // 3. The teams' parts become one; a team that had no slot has sum 0 and the lowest top.
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
#pragma unroll
            for (int j = 0; j < VECTOR; j++)
                if (lane + LANES * i < VECTORS)
                    totals[team][h][(lane + LANES * i) * VECTOR + j] = total[h].values[i * VECTOR + j];
        if (lane == 0) tops[team][h] = top[h], sums[team][h] = sum[h];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * HEAD_DIM; i += THREADS) {
        int h = i / HEAD_DIM, d = i % HEAD_DIM;
        float highest = NO_SCORE, x = 0, weights = 0;
        for (int t = 0; t < TEAMS; t++) highest = fmaxf(highest, tops[t][h]);
        for (int t = 0; t < TEAMS; t++) {
            float weight = exp2f(tops[t][h] - highest);
            x += weight * totals[t][h][d];
            weights += weight * sums[t][h];
        }
        if (num_splits == 1) {
            out[(long long)(row + h) * HEAD_DIM + d] = from_float(x / weights * v_scale);
        } else {
            if (weights > 0) piece_output(workspace, row + h, split, num_splits)[d] = x / weights * v_scale;
            if (d == 0)
                *piece_log(workspace, num_seqs * NUM_HEADS, row + h, split, num_splits) =
                    weights > 0 ? log2f(weights) + highest : NO_SCORE;
        }
    }
}
