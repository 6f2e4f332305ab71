// Loads K and V for the tensor cores: sixteen tokens of one KV head, gathered from the paged cache into shared
// memory by cp.async, and from there into mma operands by ldmatrix.
//
// A tile is 16 rows of 2 * HEAD_DIM bytes in pieces of 16. ldmatrix reads the same piece of eight rows at once: if
// rows were stored in plain order, all eight would lie in the same banks. So row r keeps piece c at place c ^ f(r),
// and the eight lie in eight different ones.
//
// Direction. Sixteen tokens of a sequence are sixteen neighbouring slots of a block, ascending or descending (16
// divides BLOCK_SIZE). A tile is always loaded in ascending slots; row r then holds token 16 * tile + (r ^ flip), with
// flip = 15 for a reversed sequence and 0 for any other. That XOR, where a mask is needed, is all that direction costs.
#pragma once
#include "common.cuh"
#include "mma.cuh"

static_assert(HEAD_DIM % 16 == 0, "an mma takes 16 dimensions at a time");
static_assert(BLOCK_SIZE % 16 == 0, "a tile of 16 tokens must not cross a block");

constexpr int TOKENS = 16;                   // of a tile
constexpr int PIECES = HEAD_DIM / 8;         // of a row
constexpr int TILE = TOKENS * HEAD_DIM;      // values
constexpr int STEPS = HEAD_DIM / 16;         // mma steps over the head dimension
constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;
constexpr int ROW_STRIDE = NUM_KV_HEADS * HEAD_DIM;  // values from a token's row to the next slot's
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
// Finite, so that no difference of two of them is NaN: the running maximum before any score, and a masked score, whose
// distance to any maximum is so large that its weight is exactly 0.
constexpr float NO_SCORE = -1e30f, MASKED = -1e37f;

// Where a tile keeps piece `piece` of row `row`, in values. f(r) uses as many bits as divide the row's pieces evenly.
__device__ __forceinline__ int place(int row, int piece) {
    constexpr int SPREAD = PIECES % 8 == 0 ? 8 : PIECES % 4 == 0 ? 4 : 2;
    return row * HEAD_DIM + ((piece ^ (row / (8 / SPREAD) % SPREAD)) * 8);
}

// One sequence, as far as loading its tiles needs it.
struct Sequence {
    const int* table;  // block ids
    int length;        // tokens
    int flip;          // 15 if reversed, else 0
};

// How far into the cache, in values, the first of the 16 slots lies that hold tokens 16 * tile ...
__device__ __forceinline__ long long tile_offset(const Sequence& s, int tile) {
    constexpr int TILES = BLOCK_SIZE / TOKENS;  // of a block
    int inside = tile % TILES;
    if (s.flip) inside = TILES - 1 - inside;
    return (long long)s.table[tile / TILES] * (BLOCK_SIZE * ROW_STRIDE) + inside * (TOKENS * ROW_STRIDE);
}

// A tile is loaded by THREADS threads in pieces of 16 bytes, neighbours next to each other. If they are a whole number
// of rows, a thread keeps its piece, and its rows are constants apart: then only `thread_offset` depends on the
// thread, and is added to the cache's address once, outside the loop.
template <int THREADS> __device__ __forceinline__ int thread_offset(int thread) {
    return THREADS % PIECES == 0 ? thread / PIECES * ROW_STRIDE + thread % PIECES * 8 : 0;
}

// Bit r says whether row r of a tile holds a token, of which `tokens` are left: the first rows, or, reversed, the last.
__device__ __forceinline__ unsigned rows_with_tokens(int tokens, int flip) {
    int gap = min(max(TOKENS - tokens, 0), TOKENS);
    return flip ? 0xffffu << gap : 0xffffu >> gap;
}

// Starts this thread's copies of a tile; `source` is the tile's first row at its head, plus thread_offset. Rows of
// tokens past the sequence's end are not read, they may be another owner's: they become zero. Only a sequence's last
// tile has such rows, so only there is it asked which.
template <int THREADS, bool FULL, int DONE = 0>  // DONE pieces are; a constant, so that addresses hold it for nothing
__device__ __forceinline__ void start_copies(shared_t tile, const scalar_t* source, unsigned present, int thread) {
    constexpr bool WHOLE_ROWS = THREADS % PIECES == 0;
    int row = WHOLE_ROWS ? thread / PIECES + DONE / PIECES : (DONE + thread) / PIECES;
    int piece = WHOLE_ROWS ? thread % PIECES : (DONE + thread) % PIECES;
    if (TOKENS * PIECES % THREADS == 0 || DONE + thread < TOKENS * PIECES)
        copy_async<WHOLE_ROWS ? DONE / PIECES * ROW_STRIDE * 2 : 0>(
            tile + place(row, piece) * 2, WHOLE_ROWS ? source : source + row * ROW_STRIDE + piece * 8,
            FULL ? 16 : (present >> row & 1) * 16);
    if constexpr (DONE + THREADS < TOKENS * PIECES) start_copies<THREADS, FULL, DONE + THREADS>(tile, source, present, thread);
}

// The same for K and V of a tile, which lie `between` values apart in shared memory.
template <int THREADS>
__device__ __forceinline__ void load_tile(scalar_t* tile, int between, const scalar_t* k, const scalar_t* v, int tokens,
                                          int flip, int thread) {
    shared_t keys = shared_address(tile), values = shared_address(tile + between);
    if (tokens >= TOKENS) {
        start_copies<THREADS, true>(keys, k, 0, thread);
        start_copies<THREADS, true>(values, v, 0, thread);
    } else {
        unsigned present = rows_with_tokens(tokens, flip);
        start_copies<THREADS, false>(keys, k, present, thread);
        start_copies<THREADS, false>(values, v, present, thread);
    }
}

// How far into a tile, in bytes, the row lies that this lane names to ldmatrix, and the piece of it, for four matrices
// that cover 16 rows x 16 dimensions: matrix m = lane / 8 lies at rows 8 * (m / 2), dimensions 8 * (m % 2), or with
// `across` the other way round.
__device__ __forceinline__ int corner(int step, int lane, bool across) {
    int low = lane / 8 % 2, high = lane / 16;
    int row = lane % 8 + 8 * (across ? low : high);
    // place(row, 2 * step + p) is place(row, p) with the bits of 16 * step flipped, if rows have a power of two of pieces.
    if ((PIECES & (PIECES - 1)) == 0) return (place(row, across ? high : low) ^ (16 * step)) * 2;
    return place(row, 2 * step + (across ? high : low)) * 2;
}
