// What every access must obey: exact bounds, alignment, slot ownership, written before read, and no race.
//
// A race is two accesses to one byte, one of them a store, by two threads that no barrier, __syncwarp or (between
// blocks) fence and atomic orders. A cell per byte of shared memory, and per element of a tensor, remembers the last
// store and the readers since; time counts barriers, so no order of execution can hide a race.
#include "state.h"

namespace emu {
constexpr uint32_t STATIC_BYTES = 64 * 1024, DYNAMIC_BYTES = 232 * 1024, ARENA_BYTES = STATIC_BYTES + DYNAMIC_BYTES;
constexpr uint32_t GAP = 128;  // between static arrays, so that running off one does not reach the next
alignas(1024) static char arena[ARENA_BYTES];
static Cell arena_cells[ARENA_BYTES];

struct Static { uint32_t start, bytes; };
static std::unordered_map<uint64_t, Static> statics;  // by declaration and size: a template has several
static uint32_t statics_end;

// What the running block knows of other blocks, by way of an atomic: accesses before these times happened before.
struct Known { uint32_t block, bound, fenced_bound, thread, thread_time, since; };
static std::vector<Known> known;                                  // by block; block = 0 means nothing
static bool anything_known;
static std::unordered_map<uint64_t, std::vector<Known>> released;  // by address of the atomic
static std::vector<uint32_t> fence_times;                         // by thread of the launch

bool start_memory() {
    statics.clear();
    statics_end = GAP;
    released.clear();
    known.assign(launch.num_blocks, Known{});
    fence_times.assign((size_t)launch.num_blocks * launch.threads, 0);
    for (int i = 0; i < launch.num_regions; i++) {
        Region& r = launch.regions[i];
        r.cells = launch.config.checks ? (Cell*)calloc(r.bytes / r.granule + 2, sizeof(Cell)) : nullptr;
        if (launch.config.checks && !r.cells) return false;
    }
    return true;
}

void end_memory() {
    for (int i = 0; i < launch.num_regions; i++) free(launch.regions[i].cells);
}

void start_block_memory() {  // 0xff bytes are NaN in every float format
    memset(arena, 0xff, statics_end);
    memset(arena + STATIC_BYTES, 0xff, launch.config.shared_bytes);
    if (anything_known) known.assign(launch.num_blocks, Known{});
    anything_known = false;
}

bool in_shared(const void* address) { return (uint64_t)((const char*)address - arena) < ARENA_BYTES; }

// ---- what is ordered before the current thread
static bool known_block_ordered(uint32_t thread, uint32_t time) {
    const Known& k = known[thread / launch.threads];
    if (!k.block || (k.since == now && current->acquire_time != now)) return false;
    bool fenced = fence_times[thread] >= time;
    return time < k.fenced_bound || (time < k.bound && fenced) || (thread == k.thread && time <= k.thread_time && fenced);
}

static bool ordered(uint32_t thread, uint32_t time, uint32_t clock) {
    const Lane& me = *current;
    if (thread == me.global) return true;
    if (time < block_start) return known_block_ordered(thread, time);
    if (time < now) return true;
    uint32_t other = thread - launch.block_id * launch.threads;  // of this block, since the same barrier
    return other >> 5 == me.thread >> 5 && me.seen[other & 31] > clock;
}

static void where(char* text, size_t size, uint32_t thread) {
    Index g = launch.config.grid, b = launch.config.block;
    uint32_t block = thread / launch.threads, t = thread % launch.threads;
    snprintf(text, size, "thread (%u, %u, %u) of block (%u, %u, %u)", t % b.x, t / b.x % b.y, t / b.x / b.y,
             block % g.x, block / g.x % g.y, block / g.x / g.y);
}

static void race(Kind kind, bool other_stored, uint32_t thread, uint32_t other_pc, uint32_t pc, const char* space) {
    char other[96];
    where(other, sizeof other, thread);
    bool same_block = thread / launch.threads == current->global / launch.threads;
    fail("race", *current, pc, other_pc, "%s %s memory that %s %s, with no %s in between",
         kind == READ ? "reads" : "stores to", space, thread == current->global ? "another thread" : other,
         other_stored ? "stored to" : "reads", same_block ? "barrier" : "fence and atomic");
}

static void touch(Cell& c, Kind kind, uint32_t pc, bool shared) {
    const Lane& me = *current;
    const char* space = shared ? "shared" : "global";
    uint32_t oldest = shared ? block_start : launch.start_time;
    bool stored = c.write_time >= oldest;
    if (c.copy_time >= block_start && shared)
        fail("race", me, pc, c.copy_pc, "%s shared memory that a cp.async not waited for still fills",
             kind == READ ? "reads" : "stores to");
    if (shared && kind != WRITE && !stored)
        fail("uninitialised read", me, pc, 0, "reads shared memory that no thread of the block has stored to, or none yet: a barrier may be missing");
    if (stored && !(kind == ATOMIC && c.write_atomic) && !ordered(c.write_thread, c.write_time, c.write_clock))
        race(kind, true, c.write_thread, c.write_pc, pc, space);
    bool read_before = c.read_time >= oldest;
    if (kind == READ) {
        uint32_t lane = 1u << lane_of(me);
        bool same_time = read_before && c.read_time == now;
        bool same_warp = same_time && (c.read_thread - launch.block_id * launch.threads) >> 5 == me.thread >> 5;
        if (!same_time) c.read_warps = 0, c.read_lanes = lane;
        else if (!same_warp) c.read_warps = 1, c.read_lanes = lane;
        else if (ordered(c.read_thread, c.read_time, c.read_clock)) c.read_lanes = (c.read_lanes & lane) | lane;
        else c.read_lanes |= lane;
        c.read_blocks = read_before && (c.read_blocks || c.read_time < block_start);
        c.read_time = now, c.read_thread = me.global, c.read_clock = me.clock, c.read_pc = pc;
        return;
    }
    if (read_before) {
        bool safe = ordered(c.read_thread, c.read_time, c.read_clock);
        if (safe && c.read_time == now) {
            safe = !c.read_warps;
            for (uint32_t l = 0; l < 32 && safe; l++)
                safe = !(c.read_lanes >> l & 1) || (int)l == lane_of(me) || me.seen[l] > c.read_clock;
        }
        if (safe && c.read_blocks) safe = anything_known;
        if (!safe) race(kind, false, c.read_thread, c.read_pc, pc, space);
    }
    c.write_time = now, c.write_thread = me.global, c.write_clock = me.clock, c.write_pc = pc;
    c.write_atomic = kind == ATOMIC;
    c.read_time = 0;
}

// ---- shared memory
static void check_shared_bounds(uint32_t offset, uint32_t size, Kind kind, uint32_t pc) {
    if (offset >= STATIC_BYTES) {
        if (offset + size <= STATIC_BYTES + launch.config.shared_bytes) return;
    } else for (const auto& entry : statics) {
        const Static& s = entry.second;
        if (offset >= s.start && offset + size <= s.start + s.bytes) return;
    }
    int64_t at = (int64_t)offset - STATIC_BYTES;
    if (at >= 0) fail("out of bounds", *current, pc, 0, "%s %u bytes at byte %lld of dynamic shared memory (%u bytes)",
                      kind == READ ? "reads" : "stores", size, (long long)at, launch.config.shared_bytes);
    fail("out of bounds", *current, pc, 0, "%s %u bytes outside every __shared__ array",
         kind == READ ? "reads" : "stores", size);
}

static void access_shared(uint32_t offset, uint32_t size, Kind kind, uint32_t pc) {
    check_shared_bounds(offset, size, kind, pc);
    for (uint32_t i = 0; i < size; i++) touch(arena_cells[offset + i], kind, pc, true);
}

void check_copy(const Copy& copy, bool issued) {
    uint32_t offset = (uint32_t)(copy.to - arena);
    if (issued) {
        access_shared(offset, copy.bytes, WRITE, copy.pc);
        count(true, WRITE, offset, copy.bytes, copy.pc, -1, offset);
    }
    for (int i = 0; i < copy.bytes; i++) {
        Cell& c = arena_cells[offset + i];
        if (issued) {
            c.copy_time = now, c.copy_pc = copy.pc;
        } else {  // it counts as a store by the thread that waited, at the time of the wait
            c.copy_time = 0;
            c.write_time = now, c.write_clock = current->clock;
        }
    }
}

// ---- global memory
static Region* region_of(uint64_t address, uint32_t size) {
    static int last = 0;
    if (last < launch.num_regions) {
        Region& r = launch.regions[last];
        if (address - (uint64_t)r.base < r.bytes && address + size <= (uint64_t)r.base + r.bytes) return &r;
    }
    for (int i = 0; i < launch.num_regions; i++) {
        Region& r = launch.regions[i];
        if (address < (uint64_t)r.base || address + size > (uint64_t)r.base + r.bytes) continue;
        last = i;
        return &r;
    }
    return nullptr;
}

static void report_stray(uint64_t address, uint32_t size, Kind kind, uint32_t pc) {
    if (address >= (uint64_t)__ehdr_start && address + size <= (uint64_t)_end) {
        if (kind != READ) fail("out of bounds", *current, pc, 0, "stores to a constant or a static variable");
        return;  // a constant table of the kernel
    }
    const Region* nearest = nullptr;
    int64_t best = INT64_MAX;
    for (int i = 0; i < launch.num_regions; i++) {
        int64_t offset = (int64_t)(address - (uint64_t)launch.regions[i].base);
        int64_t away = offset < 0 ? -offset : offset - (int64_t)launch.regions[i].bytes;
        if (away < best) best = away, nearest = &launch.regions[i];
    }
    if (!nearest) fail("out of bounds", *current, pc, 0, "touches memory that is no argument");
    else fail("out of bounds", *current, pc, 0, "%s %u bytes at byte offset %lld of argument %d, which has %llu bytes",
              kind == READ ? "reads" : "stores", size, (long long)(address - (uint64_t)nearest->base),
              nearest->argument, (unsigned long long)nearest->bytes);
}

static void check_owner(const Region& r, uint64_t offset, uint32_t size, Kind kind, uint32_t pc) {
    const int32_t* owner = kind == READ ? r.readable : r.writable;
    int32_t sequence = launch.config.serves ? launch.config.serves[launch.block_id] : -1;
    for (uint64_t slot = offset / r.slot_bytes; slot <= (offset + size - 1) / r.slot_bytes; slot++) {
        if (owner[slot] == -2 || (owner[slot] >= 0 && (sequence < 0 || sequence == owner[slot]))) continue;
        if (owner[slot] == -1)
            fail("foreign slot", *current, pc, 0, "%s slot %llu of argument %d, which no thread of this launch may",
                 kind == READ ? "reads" : "stores to", (unsigned long long)slot, r.argument);
        fail("foreign slot", *current, pc, 0, "%s slot %llu of argument %d: it is sequence %d's, this block serves %d",
             kind == READ ? "reads" : "stores to", (unsigned long long)slot, r.argument, owner[slot], sequence);
    }
}

static void access_global(Region& r, uint64_t offset, uint32_t size, Kind kind, uint32_t pc) {
    if (kind != READ) r.written = 1;
    if (r.slot_bytes) check_owner(r, offset, size, kind, pc);
    for (uint64_t cell = offset / r.granule; cell <= (offset + size - 1) / r.granule; cell++)
        touch(r.cells[cell], kind, pc, false);
}

void access(const void* pointer, uint32_t size, Kind kind, uint32_t pc, bool aligned) {
    if (!current || size == 0) return;
    uint64_t address = (uint64_t)pointer;
    if (address - (uint64_t)current->stack < STACK_BYTES) return;
    if (!launch.config.checks) return;
    if (aligned && address % size)
        fail("misaligned access", *current, pc, 0, "%s %u bytes at an address that is %u modulo %u",
             kind == READ ? "reads" : "stores", size, (unsigned)(address % size), size);
    current->steps++;
    if (in_shared(pointer)) {
        uint32_t offset = (uint32_t)((char*)pointer - arena);
        access_shared(offset, size, kind, pc);
        count(true, kind, offset, size, pc, -1, offset);
        return;
    }
    Region* r = region_of(address, size);
    if (!r) return report_stray(address, size, kind, pc);
    access_global(*r, address - (uint64_t)r->base, size, kind, pc);
    count(false, kind, address, size, pc, r->argument, address - (uint64_t)r->base);
}

// ---- order between blocks: a fence before an atomic publishes, a later atomic on the same address receives
void order_atomic(uint64_t address) {
    Lane& me = *current;
    std::vector<Known>& entries = released[address];
    if (entries.empty()) entries.resize(launch.num_blocks);
    for (uint32_t b = 0; b < launch.num_blocks; b++) {
        if (!entries[b].block || b == launch.block_id) continue;
        Known& k = known[b];
        if (k.block && k.bound >= entries[b].bound) continue;
        k = entries[b];
        k.since = now;
        anything_known = true;
    }
    me.acquire_time = now;
    if (me.fence_time == 0) return;  // an atomic without a fence before it publishes nothing
    entries[launch.block_id] = {1, now, me.fence_time, me.global, now, 0};
}
}  // namespace emu

extern "C" {
void emu_threadfence(int whole_device) {
    using namespace emu;
    if (!whole_device) return;
    current->fence_time = now;
    fence_times[current->global] = now;
}
void emu_atomic(void* address, int bytes) {
    emu::access(address, (uint32_t)bytes, emu::ATOMIC, EMU_PC, true);
    if (emu::launch.config.checks && !emu::in_shared(address)) emu::order_atomic((uint64_t)address);
}
void* emu_dynamic_shared() { return emu::arena + emu::STATIC_BYTES; }
void* emu_static_shared(int id, unsigned long bytes) {
    using namespace emu;
    uint64_t key = (uint64_t)id << 32 | bytes;
    auto found = statics.find(key);
    if (found != statics.end()) return arena + found->second.start;
    uint32_t start = statics_end, end = (start + (uint32_t)bytes + GAP + 127) / 128 * 128;
    if (end > STATIC_BYTES) fail("too much shared memory", *current, EMU_PC, 0, "static arrays need more than 48 KiB");
    statics[key] = {start, (uint32_t)bytes};
    memset(arena + start, 0xff, bytes);
    statics_end = end;
    return arena + start;
}
}
