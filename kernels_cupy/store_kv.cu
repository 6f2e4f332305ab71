// New rows of K and V to their slots. Slots are physical, so both directions are the same to it.
//
// Who does what: a thread copies 16 bytes of K and the same 16 bytes of V. Neighbouring threads take neighbouring
//   pieces of a row, so loads and stores are whole sectors.
// Bytes: each row once in, once out. Limiter: launch latency for a few tokens, DRAM bandwidth for a long prefill.
// Launch: ceil(num_tokens * ROW_VECTORS / 256) blocks of 256 threads. ROW_VECTORS is -D: 16-byte pieces of one
//   token's row of all KV heads. No slot may occur twice.

extern "C" __global__ void store_kv(const uint4* k, const uint4* v, const int* slot_mapping, uint4* k_cache,
                                    uint4* v_cache, int num_tokens) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_tokens * ROW_VECTORS) return;
    long long to = (long long)slot_mapping[i / ROW_VECTORS] * ROW_VECTORS + i % ROW_VECTORS;
    k_cache[to] = k[i];
    v_cache[to] = v[i];
}
