// Step 5: a balanced, persistent schedule, and operands swapped.
//
// Changed from step 4:
//   Schedule: all tiles of all sequences and KV heads form one line, cut into equal lengths, one for each worker (a
//   warp). Lengths differ by at most one tile for any batch, no split count has to suit sequences of different
//   lengths, and the ring runs on across the boundary between two sequences.
//   Operands: tokens are the 16 rows of the mma and heads its 8 columns, so a group of up to 8 heads fills an mma that
//   step 4 leaves half empty: half as many mma per tile, and half as many registers.
// Who does what: worker w takes units w * U / A ... (w + 1) * U / A of the line. A sequence and KV head that lies
//   whole in one worker is written at once; of others each worker leaves a piece, and merge_pieces joins them. A
//   worker has at most two pieces, at the ends of its length.
//   Scores: S[token, head] = K Q^T, weights go through 256 bytes of shared memory to become operand B of
//   O[dim, head] += V^T P. V^T comes through ldmatrix.trans.
// Bytes per output row: 4 * D * context / G of K and V, once; pieces add 8 * (D + 1) each, at most 2 * A in all.
// Expected limiter: DRAM bandwidth. Per tile a warp issues D / 8 + 1 mma, D / 8 ldmatrix, D / 8 cp.async.
// Where it loses: batches so small that there are fewer than MIN_TILES tiles for each worker leave workers idle, as
//   more pieces would cost more than they bring; 2-byte stores of the output fill half a sector.
// Launch: grid (blocks), 32 * WARPS threads, shared memory WARPS * (STAGES * 2 * TILE_BYTES + 32 * HEADS) bytes,
//   num_splits = blocks * WARPS, the number of workers, and a workspace of 2 * num_splits * HEADS * (HEAD_DIM + 1)
//   floats; then merge_pieces, grid (S * H), 128 threads, with the same num_splits.
#include "tiles.cuh"

constexpr int WARPS = HEAD_DIM > 128 ? 2 : 4;
constexpr int STAGES = HEAD_DIM * (int)sizeof(cache_t) <= 160 ? 3 : 2;
constexpr int MIN_TILES = 4;                                        // of a worker, if there are tiles enough for one
constexpr int COLUMNS = GROUP > 8 && HEAD_DIM <= 128 ? 2 : 1;       // mma columns of 8 heads
constexpr int HEADS = 8 * COLUMNS;                                  // that meet a tile at once
constexpr int HEAD_TILES = (GROUP + HEADS - 1) / HEADS;
constexpr int PAIRS = NUM_KV_HEADS * HEAD_TILES;                    // lines of tiles a sequence has

// ---- the line of all tiles: sequence by sequence, pair by pair, tile by tile

__device__ __forceinline__ int tiles_of(int length) { return (length + TOKENS - 1) / TOKENS; }

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
    for (int other = 16; other; other /= 2) x += __shfl_xor_sync(ALL, x, other);
    return x;
}

// Tiles of the sequences before `stop`, counted by a warp.
__device__ __forceinline__ int count_tiles(const int* context_lens, int stop, int lane) {
    int mine = 0;
    for (int i = lane; i < stop; i += 32) mine += tiles_of(context_lens[i]);
    return warp_sum(mine);
}

struct Line {
    long long units;    // tiles times pairs
    long long workers;  // that take part
    __device__ __forceinline__ Line(int tiles, int num_workers) {
        units = (long long)tiles * PAIRS;
        workers = min((long long)num_workers, max(units / MIN_TILES, 1ll));
    }
    __device__ __forceinline__ int begin(long long worker) const { return (int)(worker * units / workers); }
    __device__ __forceinline__ int worker_of(long long unit) const { return (int)(((unit + 1) * workers - 1) / units); }
};

struct Cursor {  // a unit of the line
    int seq, pair, tile, tiles;
    Sequence s;
};

__device__ __forceinline__ void enter(Cursor& c, int seq, const int* block_tables, const int* context_lens,
                                      const int* reversed, int max_blocks) {
    c.seq = seq;
    c.s = {block_tables + (long long)seq * max_blocks, context_lens[seq], reversed[seq] ? 15 : 0};
    c.tiles = tiles_of(c.s.length);
}

// A warp finds the sequence of a unit: 32 sequences at a time, by a prefix sum. The unit exists.
__device__ __forceinline__ int find_sequence(const int* context_lens, int num_seqs, int& unit, int lane) {
    for (int first = 0;; first += 32) {
        int units = first + lane < num_seqs ? tiles_of(context_lens[first + lane]) * PAIRS : 0, sum = units;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            int left = __shfl_up_sync(ALL, sum, step);
            if (lane >= step) sum += left;
        }
        unsigned past = __ballot_sync(ALL, sum > unit);
        if (past) {
            int found = __ffs(past) - 1;
            unit -= __shfl_sync(ALL, sum - units, found);  // now counted from that sequence's first
            return first + found;
        }
        unit -= __shfl_sync(ALL, sum, 31);
    }
}

// ---- arithmetic on one tile

struct Columns {  // of this lane: heads lane % 4 * 2 and the next, spread as mma's D
    float out[STEPS][COLUMNS][4];
    float sum[COLUMNS][4];  // every lane of a column holds its sum of weights, in [0] and [1]
    float max[COLUMNS][2];  // of the raw scores
};

// Q as operand B, from global memory. Heads past the count become zeros.
__device__ __forceinline__ void load_queries(unsigned (&queries)[STEPS][COLUMNS][2], const scalar_t* q, int heads,
                                             int lane) {
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) {
        int head = column * 8 + lane / 4;
#if KV_FP8
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint2 four = make_uint2(0, 0);
            if (head < heads) four = *(const uint2*)(q + head * HEAD_DIM + step * 16 + lane % 4 * 4);
            sort_dims(four.x, four.y, queries[step][column][0], queries[step][column][1]);
        }
#else
#pragma unroll
        for (int i = 0; i < 2 * STEPS; i++)
            queries[i / 2][column][i % 2] =
                head < heads ? *(const unsigned*)(q + head * HEAD_DIM + i * 8 + lane % 4 * 2) : 0;
#endif
    }
}

// Raises the maxima if a score passed one, and scales earlier output down.
__device__ __forceinline__ void raise_maxima(const float (&score)[COLUMNS][4], Columns& c, float scale) {
#pragma unroll
    for (int column = 0; column < COLUMNS; column++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = fmaxf(score[column][h], score[column][h + 2]);
#pragma unroll
            for (int other = 4; other < 32; other *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, other));
            top = fmaxf(top, c.max[column][h]);
            float correction = exp2f((c.max[column][h] - top) * scale);
            c.max[column][h] = top;
            c.sum[column][h] *= correction;
#pragma unroll
            for (int step = 0; step < STEPS; step++)
                c.out[step][column][h] *= correction, c.out[step][column][h + 2] *= correction;
        }
}

__device__ __forceinline__ void attend(Columns& c, const unsigned (&queries)[STEPS][COLUMNS][2], const cache_t* k_tile,
                                       const cache_t* v_tile, unsigned* scratch, int tokens, int flip, float scale,
                                       int lane) {
    // 1. Scores.
    float score[COLUMNS][4] = {};
    shared_t keys = shared_address(k_tile), values = shared_address(v_tile);
#pragma unroll
    for (int step = 0; step < STEPS; step += LOADED) {
        unsigned k[LOADED][4];
        load_operands<true, false>(k, keys + corner<PIECES>(step / LOADED, lane, true));
#pragma unroll
        for (int i = 0; i < LOADED; i++)
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) multiply_add(score[column], k[i], queries[step + i][column]);
    }
    if (tokens < TOKENS) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (((lane / 4 + 8 * half) ^ flip) >= tokens)
#pragma unroll
                for (int column = 0; column < COLUMNS; column++)
                    score[column][2 * half] = score[column][2 * half + 1] = MASKED;
    }

    // 2. Weights. Once a few tiles are through, scores seldom pass the maximum: a vote saves the rest.
    bool rose = false;
#pragma unroll
    for (int column = 0; column < COLUMNS; column++)
        rose |= fmaxf(score[column][0], score[column][2]) > c.max[column][0] ||
                fmaxf(score[column][1], score[column][3]) > c.max[column][1];
    if (__any_sync(ALL, rose)) raise_maxima(score, c, scale);

    // 3. From D's layout to B's: [column][token][8 heads] in shared memory, read back transposed.
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) {
        float low = -c.max[column][0] * scale, high = -c.max[column][1] * scale;
        scratch[column * 64 + lane] = pack(exp2f(fmaf(score[column][0], scale, low)), exp2f(fmaf(score[column][1], scale, high)));
        scratch[column * 64 + lane + 32] =
            pack(exp2f(fmaf(score[column][2], scale, low)), exp2f(fmaf(score[column][3], scale, high)));
    }
    __syncwarp();
    unsigned weights[2 * COLUMNS];
    load_matrices_trans(weights, shared_address(scratch + lane % (16 * COLUMNS) * 4));

    // 4. Output and sums.
    const unsigned ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) multiply_add(c.sum[column], ones, weights + 2 * column);
#pragma unroll
    for (int step = 0; step < STEPS; step += LOADED) {
        unsigned v[LOADED][4];
        load_operands<false, true>(v, values + corner<PIECES>(step / LOADED, lane, false));
#pragma unroll
        for (int i = 0; i < LOADED; i++)
#pragma unroll
            for (int column = 0; column < COLUMNS; column++)
                multiply_add(c.out[step + i][column], v[i], weights + 2 * column);
    }
}

// ---- results

// Hands each value of this lane to store(head, dim, value), divided by its head's sum of weights and times `factor`.
template <typename Store>
__device__ __forceinline__ void for_each_value(const Columns& c, int heads, int lane, float factor, Store store) {
#pragma unroll
    for (int column = 0; column < COLUMNS; column++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int head = column * 8 + lane % 4 * 2 + h;
            float scale = factor / c.sum[column][h];
            if (head >= heads) continue;
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    store(head, step * 16 + (FP8 ? lane / 4 * 2 + half : half * 8 + lane / 4), c.out[step][column][h + 2 * half] * scale);
        }
}

// The piece that worker leaves of its first or of a later line: outputs, and behind all outputs the logs.
__device__ __forceinline__ long long piece_of(int worker, bool first) { return (2ll * worker + (first ? 0 : 1)) * HEADS; }

__device__ __forceinline__ void store_piece(const Columns& c, int heads, float scale, float factor, float* workspace,
                                            long long piece, int num_workers, int lane) {
    for_each_value(c, heads, lane, factor,
                   [&](int head, int d, float value) { workspace[(piece + head) * HEAD_DIM + d] = value; });
    float* logs = workspace + 2ll * num_workers * HEADS * HEAD_DIM + piece;
#pragma unroll
    for (int i = 0; i < 2 * COLUMNS; i++) {
        int head = i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (lane < 4 && head < heads) logs[head] = log2f(c.sum[i / 2][i % 2]) + c.max[i / 2][i % 2] * scale;
    }
}

// The 1 asks for no occupancy: left alone, the compiler spills at HEAD_DIM 64 to reach one that shared memory forbids.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) paged_attention(
    const scalar_t* q, const cache_t* k_cache, const cache_t* v_cache, const int* block_tables,
    const int* context_lens, const int* reversed, scalar_t* out, float* workspace, float scale, int num_seqs,
    int max_blocks, int num_splits V_SCALE_PARAMETER) {
    extern __shared__ uint4 shared[];
    constexpr int RING = STAGES * 2 * TILE;  // values of one warp's ring
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    cache_t* ring = (cache_t*)shared + warp * RING;
    unsigned* scratch = (unsigned*)((cache_t*)shared + WARPS * RING) + warp * 64 * COLUMNS;

    // 1. This worker's length of the line. Neighbouring workers lie in different blocks, so few workers use all SMs.
    int worker = warp * gridDim.x + blockIdx.x;
    Line line(count_tiles(context_lens, num_seqs, lane), num_splits);
    if (worker >= line.workers || line.units == 0) return;
    int begin = line.begin(worker), end = line.begin(worker + 1);
    int unit = begin;
    Cursor now;
    enter(now, find_sequence(context_lens, num_seqs, unit, lane), block_tables, context_lens, reversed, max_blocks);
    now.pair = unit / now.tiles, now.tile = unit % now.tiles;
    Cursor ahead = now;
    auto advance = [&](Cursor& c) {
        if (++c.tile < c.tiles) return;
        c.tile = 0;
        if (++c.pair < PAIRS) return;
        c.pair = 0;
        int seq = c.seq + 1;
        while (seq < num_seqs && context_lens[seq] == 0) seq++;
        if (seq < num_seqs) enter(c, seq, block_tables, context_lens, reversed, max_blocks);
    };
    k_cache += thread_offset<32>(lane), v_cache += thread_offset<32>(lane);
    auto load = [&](int i, int stage) {  // unit i, which is where `ahead` stands
        if (i < end) {
            long long offset = tile_offset(ahead.s, ahead.tile) + ahead.pair / HEAD_TILES * HEAD_DIM;
            int tokens = ahead.s.length - ahead.tile * TOKENS;
            cache_t* k_tile = ring + stage * 2 * TILE;
            load_tile<32>(k_tile, TILE, k_cache + offset, v_cache + offset, tokens, ahead.s.flip, lane);
            advance(ahead);
        }
        copy_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) load(begin + i, i);

    // 2. Unit by unit; a new line of tiles begins with its queries, and ends with its output or a piece.
    scale *= LOG2_E;
    unsigned queries[STEPS][COLUMNS][2];
    Columns c;
    int stage = 0, line_begin = begin, first_tile = 0;
    for (int i = begin; i < end; i++) {
        int first_head = now.pair % HEAD_TILES * HEADS, heads = min(HEADS, GROUP - first_head);
        long long row = (long long)now.seq * NUM_HEADS + now.pair / HEAD_TILES * GROUP + first_head;
        if (i == begin || now.tile == 0) {
            load_queries(queries, q + row * HEAD_DIM, heads, lane);
            c = Columns();
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) c.max[column][0] = c.max[column][1] = NO_SCORE;
            line_begin = i, first_tile = now.tile;
        }
        copy_wait<STAGES - 2>();
        __syncwarp();  // every lane's copies have landed, and every lane is done with the stage that is loaded next
        load(i + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
        const cache_t* k_tile = ring + stage * 2 * TILE;
        attend(c, queries, k_tile, k_tile + TILE, scratch, now.s.length - now.tile * TOKENS, now.s.flip, scale, lane);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
        bool complete = now.tile == now.tiles - 1;
        if (complete && first_tile == 0) {
            for_each_value(c, heads, lane, v_scale, [&](int head, int d, float value) {
                out[(row + head) * HEAD_DIM + d] = from_float(value); });
        } else if (complete || i == end - 1) {
            store_piece(c, heads, scale, v_scale, workspace, piece_of(worker, line_begin == begin), num_splits, lane);
        }
        advance(now);
    }
}

// One block per row of the output: joins the pieces of a line of tiles that more than one worker had a part of. Warp w
// takes every MERGE_WARPS-th piece; a lane reads one piece's log, so that 32 are weighed at once, and then 4 neighbouring
// values of each piece. At the end the warps' parts become one in shared memory.
constexpr int MERGE_WARPS = 4;
constexpr int MERGE_VECTORS = (HEAD_DIM / 4 + 31) / 32;  // of 4 values, that a lane holds

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int other = 16; other; other /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, other));
    return x;
}

extern "C" __global__ void __launch_bounds__(32 * MERGE_WARPS) merge_pieces(
    const float* workspace, const int* context_lens, scalar_t* out, int num_seqs, int num_splits) {
    __shared__ float4 totals[MERGE_WARPS][HEAD_DIM / 4];
    __shared__ float tops[MERGE_WARPS], sums[MERGE_WARPS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x;
    int seq = row / NUM_HEADS, head = row % NUM_HEADS;

    // 1. The workers that had a part. Only the first of them can have begun before this line of tiles.
    int pair = head / GROUP * HEAD_TILES + head % GROUP / HEADS, tiles = tiles_of(context_lens[seq]);
    Line line(count_tiles(context_lens, num_seqs, lane), num_splits);
    long long start = (long long)count_tiles(context_lens, seq, lane) * PAIRS + (long long)pair * tiles;
    if (tiles == 0) return;
    int first = line.worker_of(start), last = line.worker_of(start + tiles - 1);
    if (first == last) return;
    bool begins_here = line.begin(first) >= start;
    const float* logs = workspace + 2ll * num_splits * HEADS * HEAD_DIM;
    auto place = [&](int worker) { return piece_of(worker, worker > first || begins_here) + head % GROUP % HEADS; };

    // 2. This warp's pieces, 32 at a time, with a running maximum.
    float top = NO_SCORE, sum = 0;
    float4 total[MERGE_VECTORS] = {};
    for (int some = first + warp; some <= last; some += 32 * MERGE_WARPS) {
        int mine = some + lane * MERGE_WARPS;
        float log = mine <= last ? logs[place(mine)] : NO_SCORE;
        float new_top = fmaxf(top, warp_max(log)), fade = exp2f(top - new_top);
        float weight = mine <= last ? exp2f(log - new_top) : 0;
        sum = sum * fade + weight;  // of this lane's pieces
        top = new_top;
#pragma unroll
        for (int i = 0; i < MERGE_VECTORS; i++)
            total[i].x *= fade, total[i].y *= fade, total[i].z *= fade, total[i].w *= fade;
        int count = min(32, (last - some) / MERGE_WARPS + 1);
#pragma unroll 4
        for (int j = 0; j < count; j++) {
            float w = __shfl_sync(ALL, weight, j);
            const float4* piece = (const float4*)(workspace + place(some + j * MERGE_WARPS) * HEAD_DIM);
#pragma unroll
            for (int i = 0; i < MERGE_VECTORS; i++) {
                if (32 * i + lane >= HEAD_DIM / 4) continue;
                float4 v = piece[32 * i + lane];
                total[i].x += w * v.x, total[i].y += w * v.y, total[i].z += w * v.z, total[i].w += w * v.w;
            }
        }
    }
#pragma unroll
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(ALL, sum, other);

    // 3. The warps' parts become one; a warp without a piece has sum 0.
#pragma unroll
    for (int i = 0; i < MERGE_VECTORS; i++)
        if (32 * i + lane < HEAD_DIM / 4) totals[warp][32 * i + lane] = total[i];
    if (lane == 0) tops[warp] = top, sums[warp] = sum;
    __syncthreads();
    for (int d = threadIdx.x; d < HEAD_DIM; d += 32 * MERGE_WARPS) {
        float highest = NO_SCORE, value = 0, weights = 0;
#pragma unroll
        for (int w = 0; w < MERGE_WARPS; w++) highest = fmaxf(highest, tops[w]);
#pragma unroll
        for (int w = 0; w < MERGE_WARPS; w++) {
            float weight = exp2f(tops[w] - highest);
            value += weight * ((const float*)totals[w])[d];
            weights += weight * sums[w];
        }
        out[(long long)row * HEAD_DIM + d] = from_float(value / weights);
    }
}
