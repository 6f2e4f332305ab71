// Between a layer's qkv product and its attention: rotates queries and keys by their positions, and writes keys and
// values to the cache. With QK_NORM, each query and key first gets an RMS norm (Qwen3).
//
// qkv [T, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM]: the queries of a token, its keys, its values.
// cos, sin [positions, ROTARY / 2] float: pair (d, d + ROTARY / 2) is rotated by the position's angle.
//   Dimensions from ROTARY on are copied.
// Who does what: a warp takes one row of HEAD_DIM values; neighbouring lanes take neighbouring values. Arithmetic is
//   float, and a value is rounded once. In an fp8 cache it is divided by its scale before that (fp8.cuh).
// A token with a negative slot is padding: its query is rotated, but its key and value are not stored. Without QK_NORM
//   the two norms are not read.
// Bytes: each row is read once (with QK_NORM, queries and keys again from the L1 cache) and written once. Limiter:
//   launch latency for a few tokens, DRAM bandwidth for a long prefill.
// Launch: ceil(T * rows / WARPS) blocks of 32 * WARPS threads. No slot may occur twice.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int ROWS = NUM_HEADS + 2 * NUM_KV_HEADS;  // of a token
constexpr int PAIRS = ROTARY / 2;

extern "C" __global__ void __launch_bounds__(32 * WARPS) rope_store(
    const scalar_t* qkv, const int* positions, const int* slots, const float* cos, const float* sin,
    const scalar_t* q_norm, const scalar_t* k_norm, scalar_t* q, cache_t* k_cache, cache_t* v_cache, float eps,
    int num_tokens SCALE_PARAMETERS) {
    int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= num_tokens * ROWS) return;
    int token = row / ROWS, head = row % ROWS;
    bool is_query = head < NUM_HEADS, is_value = head >= NUM_HEADS + NUM_KV_HEADS;
    qkv += (long long)row * HEAD_DIM;

    // 1. Where the row goes.
    scalar_t* to = q + ((long long)token * NUM_HEADS + head) * HEAD_DIM;
#if KV_FP8
    cache_t* cached = nullptr;  // instead of `to`, in another type
#else
    cache_t*& cached = to;
#endif
    if (!is_query) {
        long long slot = slots[token];
        if (slot < 0) return;
        cached = (is_value ? v_cache : k_cache) + (slot * NUM_KV_HEADS + (head - NUM_HEADS) % NUM_KV_HEADS) * HEAD_DIM;
    }
#if KV_FP8
    auto put = [&](int d, float x) {
        if (is_query) to[d] = from_float(x);
        else cached[d] = encode(x / (is_value ? v_scale : k_scale));
    };
    auto copy = [&](int d) { put(d, to_float(qkv[d])); };
#else
    auto put = [&](int d, float x) { to[d] = from_float(x); };
    auto copy = [&](int d) { to[d] = qkv[d]; };
#endif
    if (is_value) {
        for (int d = lane; d < HEAD_DIM; d += 32) copy(d);
        return;
    }

    // 2. The row's own scale.
    float scale = 1;
#if QK_NORM
    float squares = 0;
    for (int d = lane; d < HEAD_DIM; d += 32) squares += to_float(qkv[d]) * to_float(qkv[d]);
#pragma unroll
    for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
    scale = rsqrtf(squares / HEAD_DIM + eps);
    const scalar_t* weight = is_query ? q_norm : k_norm;
    auto value = [&](int d) { return to_float(qkv[d]) * scale * to_float(weight[d]); };
#else
    auto value = [&](int d) { return to_float(qkv[d]) * scale; };
#endif

    // 3. The rotation.
    long long angles = (long long)positions[token] * PAIRS;
    for (int d = lane; d < PAIRS; d += 32) {
        float left = value(d), right = value(d + PAIRS), c = cos[angles + d], s = sin[angles + d];
        put(d, left * c - right * s);
        put(d + PAIRS, right * c + left * s);
    }
    for (int d = ROTARY + lane; d < HEAD_DIM; d += 32) put(d, value(d));
}
