// Prefill 1: chunked prefill over the paged cache on tensor cores; decode sequences may be in the same batch.
//
// Changed from prefill 0: queries become the rows of mma.m16n8k16, so a tile of K and V that lies in shared memory
//   meets 64 query rows; scores and weights never leave registers.
// Who does what: a query row is (token, head), the G heads of one KV head following one another, so row i of a
//   sequence is token i / G and head i % G of its group: K and V are read once for the whole group, and a decode
//   sequence brings G rows instead of one. A block takes ROWS rows of one sequence and KV head, 32 for each warp (16 at
//   HEAD_DIM 256): ldmatrix then reads each fragment of K and V for two products instead of one, which matters where
//   tensor cores are faster than shared memory. All warps share the ring of K/V tiles (KEYS tokens each, gathered
//   through the block table).
// Causal: row i stands at position context_len - query_len + i / G and sees the tokens up to it. Only tiles that reach
//   past a warp's first row are masked; a block stops at its last row's position.
// Finding work: blockIdx.x counts tiles of rows over all sequences. Sequence s starts at tile
//   query_starts[s] * G / ROWS + s, which leaves room for every sequence's own rounding; so no prefix sum is needed,
//   and at most one block of a sequence has nothing to do. Blocks start with the last tile, which sees the most tokens:
//   the longest begin first, and the short ones fill the gaps at the end.
// Bytes: K and V of the visible tokens once per ROWS rows; Q and the output once.
// Expected limiter: tensor cores (with contexts of many tiles); per warp and tile of 16 tokens and 16 rows
//   4 * HEAD_DIM / 16 + 1 mma.
// Where it loses: a long context with few query rows (decode) runs in one block per KV head: split it with step 4 or 5.
// Launch: grid (T * G / ROWS + S, num_kv_heads), 128 threads, (STAGES * KEYS * 2 + ROWS) * HEAD_DIM values of
//   shared memory, those of ROWS in the type of the queries. KEYS is -D, so that the launcher can fit two blocks on a multiprocessor.
#define ROW_TILES (HEAD_DIM <= 128 ? 2 : 1)
#include "query_rows.cuh"

constexpr int WARPS = 4, WARP_ROWS = 16 * ROW_TILES, ROWS = WARP_ROWS * WARPS;
constexpr int PARTS = KEYS / TOKENS;  // KEYS: tokens of a ring stage
constexpr int STAGES = 2;
constexpr int RING_TILES = STAGES * 2 * PARTS / (sizeof(scalar_t) / sizeof(cache_t));  // as many tiles of queries

// Which rows a block takes.
struct Work {
    int seq, first_row;
    int rows;         // of the sequence: query_len * G
    int first_query;  // the sequence's first row of q
};

// The last sequence whose first tile is at most this block's, by bisection.
__device__ __forceinline__ Work find_work(const int* query_starts, int num_seqs) {
    int low = 0, high = num_seqs - 1, tile = gridDim.x - 1 - blockIdx.x;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (query_starts[middle] * GROUP / ROWS + middle <= tile) low = middle;
        else high = middle - 1;
    }
    int start = query_starts[low];
    return {low, (tile - (start * GROUP / ROWS + low)) * ROWS, (query_starts[low + 1] - start) * GROUP, start};
}

// All threads start the copies of KEYS tokens from token KEYS * tile on. Parts past the end are filled with zeros: a
// weight of 0 does not cancel a NaN that an earlier kernel left in shared memory.
__device__ __forceinline__ void load_keys(cache_t* stage, const cache_t* k_cache, const cache_t* v_cache,
                                          const Sequence& s, int tile) {
    constexpr int THREADS = 32 * WARPS;
    if ((tile + 1) * KEYS <= s.length) {  // all but the last: nothing to ask, part by part
        shared_t keys = shared_address(stage);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            long long offset = tile_offset(s, tile * PARTS + part);
            start_copies<THREADS, true>(keys + part * TILE_BYTES, k_cache + offset, 0, threadIdx.x);
            start_copies<THREADS, true>(keys + (PARTS + part) * TILE_BYTES, v_cache + offset, 0, threadIdx.x);
        }
        return;
    }
#pragma unroll 1
    for (int part = 0; part < PARTS; part++) {
        int tokens = s.length - tile * KEYS - part * TOKENS;
        long long offset = tokens > 0 ? tile_offset(s, tile * PARTS + part) : 0;
        load_tile<THREADS>(stage + part * TILE, PARTS * TILE, k_cache + offset, v_cache + offset, tokens, s.flip,
                           threadIdx.x);
    }
}

// `row(i)`: address of output row i, null if it does not exist; `factor` multiplies the output.
template <typename RowAddress>
__device__ __forceinline__ void store_rows(const Rows& rows, int lane, float factor, RowAddress row) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        scalar_t* address = row(lane / 4 + 8 * h);
        float scale = factor / rows.sum[2 * h];
        if (!address) continue;
#if KV_FP8
#pragma unroll
        for (int j = 0; j < 2 * STEPS; j += 2) {  // four neighbouring dimensions: the even ones' columns, the odd ones'
            const float *even = rows.out[j] + 2 * h, *odd = rows.out[j + 1] + 2 * h;
            *(uint2*)(address + j * 8 + lane % 4 * 4) =
                make_uint2(pack(even[0] * scale, odd[0] * scale), pack(even[1] * scale, odd[1] * scale));
        }
#else
#pragma unroll
        for (int j = 0; j < 2 * STEPS; j++)
            *(unsigned*)(address + j * 8 + lane % 4 * 2) = pack(rows.out[j][2 * h] * scale, rows.out[j][2 * h + 1] * scale);
#endif
    }
}

// Two blocks of a multiprocessor leave 255 registers for a thread.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) prefill_attention(
    const scalar_t* q /*[T,H,D]*/, const cache_t* k_cache, const cache_t* v_cache /*[num_blocks,B,K,D]*/,
    const int* block_tables /*[S,max_blocks]*/, const int* context_lens /*[S]*/, const int* reversed /*[S]*/,
    const int* query_starts /*[S+1]*/, scalar_t* out /*[T,H,D]*/, float scale, int num_seqs, int max_blocks
    V_SCALE_PARAMETER) {
    extern __shared__ uint4 shared[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y;

    // 1. The rows of this block and the tokens they see.
    Work work = find_work(query_starts, num_seqs);
    if (work.first_row >= work.rows) return;
    int first_position = context_lens[work.seq] - work.rows / GROUP;
    int last_row = min(work.first_row + ROWS, work.rows) - 1;
    Sequence s = {block_tables + (long long)work.seq * max_blocks, first_position + last_row / GROUP + 1,
                  reversed[work.seq] ? 15 : 0};
    int warp_row = work.first_row + WARP_ROWS * warp;
    bool active = warp_row < work.rows;
    auto position = [&](int i) {  // of this lane's row lane / 4 + 8 * i; asked for in masked tiles only, so not kept
        return first_position + (warp_row + lane / 4 + 8 * i) / GROUP;
    };
    auto element = [&](int i) {  // of q and out, where this warp's row i starts; -1 if it does not exist
        int row = warp_row + i;
        return row < work.rows
            ? ((long long)(work.first_query + row / GROUP) * NUM_HEADS + kv_head * GROUP + row % GROUP) * HEAD_DIM : -1;
    };

    // 2. One tile in, one tile out; all warps share them.
    cache_t* ring = (cache_t*)shared;
    const int mine = kv_head * HEAD_DIM + thread_offset<32 * WARPS>(threadIdx.x);
    k_cache += mine, v_cache += mine;
    load_keys(ring, k_cache, v_cache, s, 0);
    copy_commit();
    Queries queries[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
        load_queries(queries[m], (scalar_t*)shared + (RING_TILES + warp * ROW_TILES + m) * TILE, lane, [&](int i) {
            return element(16 * m + i) < 0 ? nullptr : q + element(16 * m + i); });
    scale *= LOG2_E;
    Rows rows[ROW_TILES] = {};
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) rows[m].max[0] = rows[m].max[1] = NO_SCORE;
    int tiles = (s.length + KEYS - 1) / KEYS;
    for (int tile = 0; tile < tiles; tile++) {
        cache_t* stage = ring + tile % STAGES * 2 * PARTS * TILE;
        copy_wait<0>();
        __syncthreads();  // this tile is there for all warps, and all are done with the stage that is loaded next
        if (tile + 1 < tiles)
            load_keys(ring + (tile + 1) % STAGES * 2 * PARTS * TILE, k_cache, v_cache, s, tile + 1);
        copy_commit();
        if (!active) continue;
        int first_token = tile * KEYS;
        bool masked = first_token + KEYS - 1 > first_position + warp_row / GROUP;
        attend<2, PARTS>(rows, queries, stage, stage + PARTS * TILE, scale, lane, masked, [&](int m, int token, int half) {
            return first_token + (token ^ s.flip) > position(2 * m + half); });
    }

    // 3. Divide and store.
    if (!active) return;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
        store_rows(rows[m], lane, v_scale, [&](int i) { return element(16 * m + i) < 0 ? nullptr : out + element(16 * m + i); });
}
