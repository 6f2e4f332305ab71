// Query rows as the M side of mma.m16n8k16: a warp holds ROW_TILES times 16 rows and meets tiles of keys and values
// (tiles.cuh). Step 4 puts the heads of one token there, prefill tokens and heads. A fragment of K or V is read from
// shared memory once for all row tiles: with two of them a byte read there serves twice the products.
//
//   S[row, token] = Q K^T: Q is operand A; K's rows, as they lie, are operand B's columns.
//   O[row, dim]  += P V:   P is S's accumulator, packed in place, because the layouts of D and A agree; V comes
//                          through ldmatrix.trans. The sum of a row's weights is one more mma, against ones: so it
//                          sums the rounded weights, the same that multiply V.
#pragma once
#include "tiles.cuh"

#ifndef ROW_TILES
#define ROW_TILES 1
#endif
// D = 256, or two row tiles, leave no registers for Q: it stays in shared memory and is read once a tile.
constexpr bool Q_IN_REGISTERS = HEAD_DIM <= 128 && ROW_TILES == 1;
static_assert(!FP8 || !Q_IN_REGISTERS, "queries are put in the order of an fp8 cache on their way to shared memory");
constexpr int QUERY_PIECES = HEAD_DIM / 8;  // of 16 bytes, of a row of Q

struct Rows {  // of this lane, in one row tile: rows lane / 4 and lane / 4 + 8, spread as mma's D
    float out[2 * STEPS][4];  // of dimensions 8 * j and on; fp8: of 16 * (j / 2) and on, the even or the odd ones
    float sum[4];  // every lane of a row holds its sum of weights, in [0] and [2]
    float max[2];  // of the raw scores
};

struct Queries {
    unsigned fragment[Q_IN_REGISTERS ? STEPS : 1][4];
    const scalar_t* tile;  // 16 swizzled rows in shared memory, if not in registers
};

// Takes 16 query rows of this warp as operand A. `row(i)` is the address of row i, or null for a row that does not
// exist, which becomes zeros. `tile` is used by Q_IN_REGISTERS == false only.
template <typename RowAddress>
__device__ __forceinline__ void load_queries(Queries& queries, scalar_t* tile, int lane, RowAddress row) {
    if constexpr (Q_IN_REGISTERS) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const scalar_t* address = row(lane / 4 + 8 * half);
#pragma unroll
            for (int i = 0; i < 2 * STEPS; i++)
                queries.fragment[i / 2][half + i % 2 * 2] =
                    address ? *(const unsigned*)(address + i * 8 + lane % 4 * 2) : 0;
        }
    } else {
#if KV_FP8
        for (int i = lane; i < TOKENS * STEPS; i += 32) {  // both pieces of a step at once: even dimensions, odd ones
            const uint4* address = (const uint4*)row(i / STEPS);
            uint4 even = make_uint4(0, 0, 0, 0), odd = even;
            if (address) {
                uint4 low = address[i % STEPS * 2], high = address[i % STEPS * 2 + 1];
                sort_dims(low.x, low.y, even.x, odd.x), sort_dims(low.z, low.w, even.y, odd.y);
                sort_dims(high.x, high.y, even.z, odd.z), sort_dims(high.z, high.w, even.w, odd.w);
            }
            *(uint4*)(tile + place<QUERY_PIECES>(i / STEPS, i % STEPS * 2)) = even;
            *(uint4*)(tile + place<QUERY_PIECES>(i / STEPS, i % STEPS * 2 + 1)) = odd;
        }
#else
        for (int i = lane; i < TOKENS * PIECES; i += 32) {
            const scalar_t* address = row(i / PIECES);
            *(uint4*)(tile + place<PIECES>(i / PIECES, i % PIECES)) =
                address ? ((const uint4*)address)[i % PIECES] : make_uint4(0, 0, 0, 0);
        }
#endif
        __syncwarp();
        queries.tile = tile;
    }
}

// The highest score this lane holds of row lane / 4 + 8 * h.
template <int PARTS> __device__ __forceinline__ float highest(const float (&score)[2 * PARTS][4], int h) {
    float top = fmaxf(score[0][2 * h], score[0][2 * h + 1]);
#pragma unroll
    for (int j = 1; j < 2 * PARTS; j++) top = fmaxf(top, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
    return top;
}

// The four lanes of a row agree on a new maximum, `top` being what each saw; earlier output is scaled down to it.
__device__ __forceinline__ void raise_maximum(Rows& rows, int h, float top, float scale) {
    top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
    top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
    top = fmaxf(top, rows.max[h]);
    float correction = exp2f((rows.max[h] - top) * scale);
    rows.max[h] = top;
    rows.sum[2 * h] *= correction;
#pragma unroll
    for (int j = 0; j < 2 * STEPS; j++) rows.out[j][2 * h] *= correction, rows.out[j][2 * h + 1] *= correction;
}

// Raw scores to weights 2^((s - max) * scale), in place. Any reference does for the maximum, as long as no weight leaves
// fp16: so it is raised only if a score passes it by SLACK powers of two. Then, once a tile or two are through, one
// vote saves the shuffles and the rescaling.
constexpr float SLACK = 8;
template <int HALVES, int PARTS>
__device__ __forceinline__ void softmax_step(float (&score)[2 * PARTS][4], Rows& rows, float scale) {
    float top[2] = {highest<PARTS>(score, 0), HALVES == 2 ? highest<PARTS>(score, 1) : NO_SCORE};
    if (__any_sync(ALL, (top[0] - rows.max[0]) * scale > SLACK || (top[1] - rows.max[1]) * scale > SLACK))
#pragma unroll
        for (int h = 0; h < HALVES; h++) raise_maximum(rows, h, top[h], scale);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        float zero = -rows.max[h] * scale;
#pragma unroll
        for (int j = 0; j < 2 * PARTS; j++)
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; e++) score[j][e] = exp2f(fmaf(score[j][e], scale, zero));
    }
}

// LOADED steps of the head dimension of Q K^T: pieces of Q, [step][row tile], meet the keys of all parts. PART is a
// constant, so that an address holds it for nothing; so too below.
template <int PARTS, int PART = 0>
__device__ __forceinline__ void add_scores(float (&score)[ROW_TILES][2 * PARTS][4], const unsigned (*q)[4], shared_t keys) {
    unsigned k[LOADED][4];
    load_operands<false, false, PART * TILE_BYTES>(k, keys);
#pragma unroll
    for (int i = 0; i < LOADED; i++)
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            multiply_add(score[m][2 * PART], q[i * ROW_TILES + m], k[i]);
            multiply_add(score[m][2 * PART + 1], q[i * ROW_TILES + m], k[i] + 2);
        }
    if constexpr (PART + 1 < PARTS) add_scores<PARTS, PART + 1>(score, q, keys);
}

// P V, part by part.
template <int HALVES, int PARTS, int PART = 0>
__device__ __forceinline__ void add_outputs(Rows (&rows)[ROW_TILES], const float (&weight)[ROW_TILES][2 * PARTS][4],
                                            shared_t values, int lane) {
    const unsigned ones[2] = {ONES, ONES};
    unsigned weights[ROW_TILES][4] = {};
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i % 2 < HALVES)
                weights[m][i] = pack(weight[m][2 * PART + i / 2][i % 2 * 2], weight[m][2 * PART + i / 2][i % 2 * 2 + 1]);
        multiply_add(rows[m].sum, weights[m], ones);
    }
#pragma unroll
    for (int step = 0; step < STEPS; step += LOADED) {
        unsigned v[LOADED][4];
        load_operands<true, true, PART * TILE_BYTES>(v, values + corner<PIECES>(step / LOADED, lane, true));
#pragma unroll
        for (int i = 0; i < LOADED; i++)
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
                multiply_add(rows[m].out[2 * (step + i)], weights[m], v[i]);
                multiply_add(rows[m].out[2 * (step + i) + 1], weights[m], v[i] + 2);
            }
    }
    if constexpr (PART + 1 < PARTS) add_outputs<HALVES, PARTS, PART + 1>(rows, weight, values, lane);
}

// PARTS tiles of 16 tokens meet the rows. HALVES = 1: rows 8 to 15 do not exist. If `masked`, `hides(m, token, half)`
// says whether row lane / 4 + 8 * half of row tile m may not see row `token` of the tiles.
template <int HALVES, int PARTS, typename Hides>
__device__ __forceinline__ void attend(Rows (&rows)[ROW_TILES], const Queries (&queries)[ROW_TILES],
                                       const cache_t* k_tiles, const cache_t* v_tiles, float scale, int lane,
                                       bool masked, Hides hides) {
    float score[ROW_TILES][2 * PARTS][4] = {};
    shared_t keys = shared_address(k_tiles);
#pragma unroll
    for (int step = 0; step < STEPS; step += LOADED) {
        unsigned q[LOADED * ROW_TILES][4];
        if constexpr (!Q_IN_REGISTERS)
#pragma unroll
            for (int i = 0; i < LOADED * ROW_TILES; i++)
                load_matrices(q[i], shared_address(queries[i % ROW_TILES].tile) +
                                        corner<QUERY_PIECES>(step + i / ROW_TILES, lane, true));
        add_scores<PARTS>(score, Q_IN_REGISTERS ? &queries[0].fragment[step] : q,
                          keys + corner<PIECES>(step / LOADED, lane, false));
    }
    if (masked) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
            for (int j = 0; j < 2 * PARTS; j++)
#pragma unroll
                for (int e = 0; e < 2 * HALVES; e++)
                    if (hides(m, j * 8 + lane % 4 * 2 + e % 2, e / 2)) score[m][j][e] = MASKED;
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) softmax_step<HALVES, PARTS>(score[m], rows[m], scale);
    add_outputs<HALVES, PARTS>(rows, score, shared_address(v_tiles), lane);
}
