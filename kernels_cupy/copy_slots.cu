// Slots of a KV store to slots of another (or the same), all layers in one launch: checkpoint, restore, relocation.
//
// Stores are [planes][slots][ROW_VECTORS] of 16 bytes, a plane being the K or the V of one layer. `slots` is
//   [num_pairs, 2]: from, to. With pinned host memory as one of the stores this is the whole of a checkpoint.
// Who does what: a block takes one pair and one plane, its threads the pieces of the row.
// Every source is read before or while others are written, so no slot may be both a source and a destination of one
//   launch, and no destination may occur twice; the caller orders checkpoint, relocate, restore.
// Bytes: each row once in, once out. Limiter: PCIe for host stores; rows of a few hundred bytes each way.
// Launch: grid (num_pairs, planes), 64 threads.

extern "C" __global__ void copy_slots(const uint4* source, uint4* destination, const int* slots, int source_slots,
                                      int destination_slots) {
    long long from = ((long long)blockIdx.y * source_slots + slots[2 * blockIdx.x]) * ROW_VECTORS;
    long long to = ((long long)blockIdx.y * destination_slots + slots[2 * blockIdx.x + 1]) * ROW_VECTORS;
    for (int i = threadIdx.x; i < ROW_VECTORS; i += blockDim.x) destination[to + i] = source[from + i];
}
