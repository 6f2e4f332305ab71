// ldmatrix, mma.m16n8k16 and cp.async, by the layouts of the PTX manual. The products are exact in float; the sum is
// taken in float in the order of k, which differs from a tensor core's in the last bits only.
#include "state.h"

extern "C" float emu_half_to_float(unsigned short bits);

namespace emu {
void collective(Op op, int detail, uint32_t mask, uint32_t pc);

static float from_bits(uint16_t bits, bool bfloat) {
    if (!bfloat) return emu_half_to_float(bits);
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
static uint16_t half_of(uint32_t pair, int i) { return (uint16_t)(pair >> (16 * i)); }

static void load_matrices(Lane* warp, int count, bool transposed) {
    for (int m = 0; m < count; m++) {
        const uint16_t* rows[8];
        for (int r = 0; r < 8; r++) rows[r] = (const uint16_t*)warp[8 * m + r].in_a;
        for (int l = 0; l < 32; l++) {
            int i = l / 4, j = l % 4 * 2;
            uint16_t low = transposed ? rows[j][i] : rows[i][j], high = transposed ? rows[j + 1][i] : rows[i][j + 1];
            ((uint32_t*)warp[l].out)[m] = low | (uint32_t)high << 16;
        }
    }
}

static void multiply(Lane* warp, bool bfloat) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; l++) {
        const uint32_t *ra = (const uint32_t*)warp[l].in_a, *rb = (const uint32_t*)warp[l].in_b;
        int group = l / 4, pair = l % 4 * 2;
        for (int i = 0; i < 4; i++)
            for (int h = 0; h < 2; h++)
                a[group + i % 2 * 8][pair + i / 2 * 8 + h] = from_bits(half_of(ra[i], h), bfloat);
        for (int i = 0; i < 2; i++)
            for (int h = 0; h < 2; h++) b[pair + i * 8 + h][group] = from_bits(half_of(rb[i], h), bfloat);
    }
    for (int l = 0; l < 32; l++) {
        float* d = (float*)warp[l].out;
        for (int i = 0; i < 4; i++) {
            int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
            float sum = d[i];
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            d[i] = sum;
        }
    }
}

// Products, and the groups of asynchronous copies under way at each: a kernel that waits for all it has just asked for
// gives right answers, slowly.
static uint64_t products[2];

void start_products() { products[0] = products[1] = 0; }

static void count_product(const Lane& lane) {
    products[0]++;
    for (size_t i = 0; i < lane.copies.size(); i++)
        products[1] += i == 0 || lane.copies[i].group != lane.copies[i - 1].group;
}

void run_matrix_op(Lane* warp, Op op, int detail) {  // every address was checked when its lane came
    if (op == MMA) {
        count_product(warp[0]);
        return multiply(warp, detail);
    }
    int count = detail / 2;
    load_matrices(warp, count, detail & 1);
    if (launch.config.counters) count_matrix(warp, count, warp[0].wait_pc);
}

static void land(const Copy& copy) {
    memcpy(copy.to, copy.from, copy.source_bytes);
    memset(copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

void finish_copies(Lane& lane, uint32_t below_group) {
    size_t kept = 0;
    for (const Copy& copy : lane.copies) {
        if (copy.group >= below_group) {
            lane.copies[kept++] = copy;
            continue;
        }
        if (!launch.config.early_copies) land(copy);
        if (launch.config.checks) check_copy(copy, false);
    }
    lane.copies.resize(kept);
}

static void ldmatrix(void* out, const void* row, int count, bool transposed, uint32_t pc) {
    current->in_a = row, current->out = out;
    if (lane_of(*current) < 8 * count) {  // the other lanes' addresses are not used
        if (!in_shared(row)) fail("out of bounds", *current, pc, 0, "ldmatrix reads outside of shared memory");
        bool counted = launch.config.counters;
        launch.config.counters = 0;  // counted for the warp as a whole, when it runs
        access(row, 16, READ, pc, true);
        launch.config.counters = counted;
    }
    collective(LDMATRIX, count * 2 + transposed, 0xffffffffu, pc);
}

static void mma(float* d, const void* a, const void* b, bool bfloat, uint32_t pc) {
    current->out = d, current->in_a = a, current->in_b = b;
    collective(MMA, bfloat, 0xffffffffu, pc);
}
}  // namespace emu

extern "C" __attribute__((visibility("default"))) void emu_products(uint64_t* out) {
    out[0] = emu::products[0], out[1] = emu::products[1];
}

extern "C" {
#define EMU_LDMATRIX(n)                                                                                              \
    void emu_ldmatrix_x##n(unsigned* r, const void* row) { emu::ldmatrix(r, row, n, false, EMU_PC); }                \
    void emu_ldmatrix_x##n##_trans(unsigned* r, const void* row) { emu::ldmatrix(r, row, n, true, EMU_PC); }
EMU_LDMATRIX(1)
EMU_LDMATRIX(2)
EMU_LDMATRIX(4)
void emu_mma_m16n8k16_f16(float* d, const unsigned* a, const unsigned* b) { emu::mma(d, a, b, false, EMU_PC); }
void emu_mma_m16n8k16_bf16(float* d, const unsigned* a, const unsigned* b) { emu::mma(d, a, b, true, EMU_PC); }

void emu_cp_async(void* smem, const void* gmem, int bytes, int source_bytes) {
    using namespace emu;
    Copy copy = {(char*)smem, (const char*)gmem, bytes, source_bytes, current->committed, EMU_PC};
    if ((bytes != 4 && bytes != 8 && bytes != 16) || source_bytes < 0 || source_bytes > bytes)
        fail("bad cp.async", *current, copy.pc, 0, "copies %d of %d bytes", source_bytes, bytes);
    if (!in_shared(smem)) fail("out of bounds", *current, copy.pc, 0, "cp.async stores outside of shared memory");
    if ((uint64_t)smem % bytes || (uint64_t)gmem % bytes)
        fail("misaligned access", *current, copy.pc, 0, "cp.async of %d bytes needs both addresses aligned to them", bytes);
    if (source_bytes) access(gmem, (uint32_t)source_bytes, READ, copy.pc, false);
    if (launch.config.checks) check_copy(copy, true);
    if (launch.config.early_copies) land(copy);
    current->copies.push_back(copy);
}
void emu_cp_async_commit() { emu::current->committed++; }
void emu_cp_async_wait(int groups_left) {
    uint32_t committed = emu::current->committed;
    emu::finish_copies(*emu::current, committed > (uint32_t)groups_left ? committed - (uint32_t)groups_left : 0);
}
}
