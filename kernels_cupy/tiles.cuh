// Loads K and V for the tensor cores: sixteen tokens of one KV head, gathered from the paged cache into shared
// memory by cp.async, and from there into mma operands by ldmatrix.
//
// A tile is 16 rows of HEAD_DIM values in pieces of 16 bytes. ldmatrix reads the same piece of eight rows at once: if
// rows were stored in plain order, all eight would lie in the same banks. So row r keeps piece c at place c ^ f(r),
// and the eight lie in eight different ones.
//
// Direction. Sixteen tokens of a sequence are sixteen neighbouring slots of a block, ascending or descending (16
// divides BLOCK_SIZE). A tile is always loaded in ascending slots; row r then holds token 16 * tile + (r ^ flip), with
// flip = 15 for a reversed sequence and 0 for any other. That XOR, where a mask is needed, is all that direction costs.
//
// fp8 cache. Tiles hold bytes, a piece 16 dimensions. ldmatrix moves pairs of them, and each register that it fills is
// decoded into two, its even and its odd bytes (fp8.cuh). So where 16-bit operands hold 16 dimensions in order, these hold
// the even ones and then the odd ones: queries are put in the same order, and outputs are told apart when they are stored.
#pragma once
#include "common.cuh"
#include "mma.cuh"

constexpr bool FP8 = sizeof(cache_t) == 1;
static_assert(HEAD_DIM % (FP8 ? 32 : 16) == 0, "an mma takes 16 dimensions at a time, an ldmatrix two pieces of a row");
static_assert(BLOCK_SIZE % 16 == 0, "a tile of 16 tokens must not cross a block");

constexpr int TOKENS = 16;                   // of a tile
constexpr int VALUES = 16 / sizeof(cache_t); // of a piece of 16 bytes
constexpr int PIECES = HEAD_DIM / VALUES;    // of a row
constexpr int TILE = TOKENS * HEAD_DIM;      // values
constexpr int TILE_BYTES = TILE * sizeof(cache_t);
constexpr int STEPS = HEAD_DIM / 16;         // mma steps over the head dimension
constexpr int LOADED = FP8 ? 2 : 1;          // of them, that the operands of one ldmatrix are for
constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;
constexpr int ROW_STRIDE = NUM_KV_HEADS * HEAD_DIM;  // values from a token's row to the next slot's
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
// Finite, so that no difference of two of them is NaN: the running maximum before any score, and a masked score, whose
// distance to any maximum is so large that its weight is exactly 0.
constexpr float NO_SCORE = -1e30f, MASKED = -1e37f;

// Where a tile keeps piece `piece` of row `row`, in units of 2 bytes, which ldmatrix moves. f(r) uses as many bits as divide the row's pieces evenly.
template <int ROW_PIECES> __device__ __forceinline__ int place(int row, int piece) {
    constexpr int SPREAD = ROW_PIECES % 8 == 0 ? 8 : ROW_PIECES % 4 == 0 ? 4 : 2;
    return row * (ROW_PIECES * 8) + ((piece ^ (row / (8 / SPREAD) % SPREAD)) * 8);
}

#if KV_FP8
// Two decoded halves in the type of the queries; exact, e4m3 has three bits of mantissa.
__device__ __forceinline__ unsigned decoded(unsigned halves) {
#if SCALAR == 1
    return halves;
#else
    float2 pair = to_floats(halves);
    return pack(pair.x, pair.y);
#endif
}
#endif

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
    return THREADS % PIECES == 0 ? thread / PIECES * ROW_STRIDE + thread % PIECES * VALUES : 0;
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
__device__ __forceinline__ void start_copies(shared_t tile, const cache_t* source, unsigned present, int thread) {
    constexpr bool WHOLE_ROWS = THREADS % PIECES == 0;
    int row = WHOLE_ROWS ? thread / PIECES + DONE / PIECES : (DONE + thread) / PIECES;
    int piece = WHOLE_ROWS ? thread % PIECES : (DONE + thread) % PIECES;
    if (TOKENS * PIECES % THREADS == 0 || DONE + thread < TOKENS * PIECES)
        copy_async<WHOLE_ROWS ? DONE / PIECES * ROW_STRIDE * (int)sizeof(cache_t) : 0>(
            tile + place<PIECES>(row, piece) * 2, WHOLE_ROWS ? source : source + row * ROW_STRIDE + piece * VALUES,
            FULL ? 16 : (present >> row & 1) * 16);
    if constexpr (DONE + THREADS < TOKENS * PIECES) start_copies<THREADS, FULL, DONE + THREADS>(tile, source, present, thread);
}

// The same for K and V of a tile, which lie `between` values apart in shared memory.
template <int THREADS>
__device__ __forceinline__ void load_tile(cache_t* tile, int between, const cache_t* k, const cache_t* v, int tokens,
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
// that cover 16 rows x 2 pieces, the pair `pair` of its rows: matrix m = lane / 8 lies at rows 8 * (m / 2), piece m % 2,
// or with `across` the other way round.
template <int ROW_PIECES> __device__ __forceinline__ int corner(int pair, int lane, bool across) {
    int low = lane / 8 % 2, high = lane / 16;
    int row = lane % 8 + 8 * (across ? low : high);
    // place(row, 2 * pair + p) is place(row, p) with the bits of 16 * pair flipped, if rows have a power of two of pieces.
    if ((ROW_PIECES & (ROW_PIECES - 1)) == 0) return (place<ROW_PIECES>(row, across ? high : low) ^ (16 * pair)) * 2;
    return place<ROW_PIECES>(row, 2 * pair + (across ? high : low)) * 2;
}

// Four matrices of a tile of the cache as the operands of LOADED mma steps, TRANS for V. `corner` is that of the same
// ACROSS, which says what the registers hold: with it K is operand A and V operand B, without it the other way round.
template <bool ACROSS, bool TRANS, int OFFSET = 0>
__device__ __forceinline__ void load_operands(unsigned (&operands)[LOADED][4], shared_t corner) {
#if KV_FP8
    unsigned bytes[4];
    if (TRANS) load_matrices_trans<OFFSET>(bytes, corner);
    else load_matrices<OFFSET>(bytes, corner);
#pragma unroll
    for (int i = 0; i < 2; i++) {  // piece i of the pair: its first eight rows, and its last
        unsigned first = bytes[ACROSS ? 2 * i : i], last = bytes[ACROSS ? 2 * i + 1 : 2 + i];
        operands[i][0] = decoded(even_halves(first));
        operands[i][ACROSS ? 2 : 1] = decoded(odd_halves(first));
        operands[i][ACROSS ? 1 : 2] = decoded(even_halves(last));
        operands[i][3] = decoded(odd_halves(last));
    }
#else
    if (TRANS) load_matrices_trans<OFFSET>(operands[0], corner);
    else load_matrices<OFFSET>(operands[0], corner);
#endif
}

// Two and two neighbouring values of a query in the order of decoded operands: the even ones, the odd ones.
__device__ __forceinline__ void sort_dims(unsigned first, unsigned second, unsigned& even, unsigned& odd) {
    even = (first & 0xffff) | second << 16;
    odd = first >> 16 | (second & 0xffff0000u);
}
