// Prefill 0: one warp per query row, any element type, any block size. What fp32 models and odd block sizes run on,
// and what prefill 1 is compared with.
//
// Who does what: a warp takes one token and one query head; a block takes WARPS heads of a token. For 32 keys at a
//   time each lane scores one key (its own row of K, 16 bytes per load), the warp agrees on the new maximum, then each
//   lane adds up its own dimensions of V over the 32 keys (neighbouring lanes, neighbouring addresses). Weights and
//   row offsets pass through shared memory.
// Causal: the row of a token at position p sees keys 0 ... p, and reads no other slot. Here every lane computes the slot
//   of its key from the logical position, so direction is one subtraction per key.
// Bytes per output row of D values: all visible K and V, once per head: G times what prefill 1 reads per row, and no
//   two rows share a load.
// Expected limiter: load instructions and L2; no tensor cores.
// Where it loses: everywhere but fp32.
// Launch: grid (T, ceil(num_heads / 4)), 128 threads, no dynamic shared memory.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;
constexpr int VALUES = 16 / sizeof(cache_t);     // of a 16-byte load
constexpr int DIMS = (HEAD_DIM + 31) / 32;       // of a lane: lane, lane + 32, ...
constexpr unsigned ALL = 0xffffffffu;
static_assert(HEAD_DIM % VALUES == 0, "rows are read 16 bytes at a time");

struct __align__(16) Piece { cache_t value[VALUES]; };

// The last sequence that starts at or before this token, by bisection.
__device__ __forceinline__ int find_sequence(const int* query_starts, int num_seqs, int token) {
    int low = 0, high = num_seqs - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (query_starts[middle] <= token) low = middle;
        else high = middle - 1;
    }
    return low;
}

__device__ __forceinline__ float dot(const float* q, const cache_t* k) {
    float sums[VALUES] = {};  // several short sums round less than one long one
#pragma unroll
    for (int i = 0; i < HEAD_DIM; i += VALUES) {
        Piece piece = *(const Piece*)(k + i);
#pragma unroll
        for (int j = 0; j < VALUES; j++) sums[j] += q[i + j] * to_float(piece.value[j]);
    }
    float sum = 0;
#pragma unroll
    for (int j = 0; j < VALUES; j++) sum += sums[j];
    return sum;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int other = 16; other; other /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, other));
    return x;
}
__device__ __forceinline__ float warp_sum(float x) {
    for (int other = 16; other; other /= 2) x += __shfl_xor_sync(ALL, x, other);
    return x;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) prefill_attention(
    const scalar_t* q /*[T,H,D]*/, const cache_t* k_cache, const cache_t* v_cache /*[num_blocks,B,K,D]*/,
    const int* block_tables /*[S,max_blocks]*/, const int* context_lens /*[S]*/, const int* reversed /*[S]*/,
    const int* query_starts /*[S+1]*/, scalar_t* out /*[T,H,D]*/, float scale, int num_seqs, int max_blocks
    V_SCALE_PARAMETER) {
    __shared__ float query[WARPS][HEAD_DIM];
    __shared__ float weights[WARPS][32];
    __shared__ long long offsets[WARPS][32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = blockIdx.x, head = blockIdx.y * WARPS + warp;
    if (head >= NUM_HEADS) return;  // a whole warp, and no barrier of the block follows

    // 1. Whose row this is, and what it sees.
    int seq = find_sequence(query_starts, num_seqs, token);
    int visible = context_lens[seq] - (query_starts[seq + 1] - 1 - token);
    bool flip = reversed[seq] != 0;
    const int* table = block_tables + (long long)seq * max_blocks;
    long long row = ((long long)token * NUM_HEADS + head) * HEAD_DIM;
    for (int d = lane; d < HEAD_DIM; d += 32) query[warp][d] = to_float(q[row + d]);
    __syncwarp();

    // 2. 32 keys at a time.
    scale *= 1.4426950408889634f;
    float top = -1e30f, sum = 0, total[DIMS] = {};
    for (int first = 0; first < visible; first += 32) {
        int position = first + lane, count = min(32, visible - first);
        float score = -1e37f;
        if (position < visible) {
            int inside = position % BLOCK_SIZE;
            long long slot = (long long)table[position / BLOCK_SIZE] * BLOCK_SIZE
                           + (flip ? BLOCK_SIZE - 1 - inside : inside);
            offsets[warp][lane] = (slot * NUM_KV_HEADS + head / GROUP) * HEAD_DIM;
            score = dot(query[warp], k_cache + offsets[warp][lane]);
        }
        float new_top = fmaxf(top, warp_max(score));
        float correction = exp2f((top - new_top) * scale), weight = exp2f((score - new_top) * scale);
        top = new_top;
        sum = sum * correction + weight;  // of this lane's keys
        weights[warp][lane] = weight;
        __syncwarp();  // weights and offsets are there
#pragma unroll
        for (int i = 0; i < DIMS; i++) total[i] *= correction;
        for (int j = 0; j < count; j++) {
            const cache_t* v = v_cache + offsets[warp][j];
#pragma unroll
            for (int i = 0; i < DIMS; i++)
                if (lane + 32 * i < HEAD_DIM) total[i] += weights[warp][j] * to_float(v[lane + 32 * i]);
        }
        __syncwarp();  // all lanes are done with them
    }

    // 3. Divide and store.
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < DIMS; i++)
        if (lane + 32 * i < HEAD_DIM) out[row + lane + 32 * i] = from_float(total[i] / sum * v_scale);
}
