// Runs the blocks of a launch: threads as fibers, barriers, warp collectives, and what to say when they do not meet.
#include "state.h"

namespace emu {
Launch launch;
Lane* lanes;
Lane* current;
Warp warps[32];
Index block_index;
uint32_t now = 1, block_start = 1;
Fiber scheduler;
static uint32_t exited;
static uint32_t order_of[1024];

void fail(const char* what, const Lane& who, uint32_t pc, uint32_t other_pc, const char* format, ...) {
    if (!launch.failed) {
        Fault& fault = *launch.fault;
        launch.failed = true;
        snprintf(fault.what, sizeof fault.what, "%s", what);
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(fault.message, sizeof fault.message, format, arguments);
        va_end(arguments);
        fault.pc = pc;
        fault.other_pc = other_pc;
        fault.block = block_index;
        fault.thread = who.index;
    }
    if (current) leave();  // never resumed
}

void leave() {
    Lane* me = current;
    switch_fiber(me->fiber, scheduler);
}

static void thread_main() {
    emu_entry(launch.arguments);
    current->state = EXITED;
    leave();
}

// ---- warp collectives: the last lane to come computes for all, so no lane can overtake another's operands
static Lane* first_of(const Lane& lane) { return lanes + (lane.thread & ~31u); }

static const char* name_of(const Lane& lane) {
    static const char* const names[] = {"__syncwarp", "shuffle", "vote", "__reduce_sync", "ldmatrix", "mma"};
    return names[lane.op];
}

static void order_lanes(Lane* warp, uint32_t mask) {
    uint32_t merged[32] = {};
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        for (int m = 0; m < 32; m++) merged[m] = merged[m] > warp[l].seen[m] ? merged[m] : warp[l].seen[m];
        merged[l] = merged[l] > warp[l].clock + 1 ? merged[l] : warp[l].clock + 1;
    }
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        memcpy(warp[l].seen, merged, sizeof merged);
        warp[l].clock++;
    }
}

static void shuffle(Lane* warp, uint32_t present) {
    for (int l = 0; l < 32; l++) {
        if (!(present >> l & 1)) continue;
        Lane& lane = warp[l];
        int width = lane.width, segment = l & ~(width - 1), source = l;
        switch (lane.detail) {
            case 0: source = segment | (lane.argument & (width - 1)); break;
            case 1: if (l - lane.argument >= segment) source = l - lane.argument; break;
            case 2: if (l + lane.argument < segment + width) source = l + lane.argument; break;
            default: if ((l ^ lane.argument) < segment + width) source = l ^ lane.argument;
        }
        if (!(present >> source & 1)) {
            fail("undefined shuffle", lane, lane.wait_pc, 0,
                 "takes the value of lane %d, which does not take part (mask 0x%08x)", source, lane.mask);
            return;
        }
        lane.result = warp[source].value;
    }
}

static void reduce(Lane* warp, uint32_t present) {
    bool first = true;
    int64_t total = 0;
    for (int l = 0; l < 32; l++) {
        if (!(present >> l & 1)) continue;
        int64_t v = warp[l].argument ? (int64_t)(int32_t)warp[l].value : (int64_t)(uint32_t)warp[l].value;
        if (first) total = v;
        else switch (warp[l].detail) {
            case 0: total += v; break;
            case 1: total = v < total ? v : total; break;
            case 2: total = v > total ? v : total; break;
            case 3: total &= v; break;
            default: total |= v;
        }
        first = false;
    }
    for (int l = 0; l < 32; l++) warp[l].result = (uint32_t)total;
}

static void complete(Lane& last) {
    Lane* warp = first_of(last);
    Warp& state = warp_of(last);
    uint32_t present = last.mask & state.alive;
    if (last.op >= LDMATRIX && present != 0xffffffffu)
        return fail("divergent collective", last, last.wait_pc, 0, "%s needs all 32 lanes of the warp, has 0x%08x",
                    name_of(last), present);
    uint32_t ballot = 0;
    for (int l = 0; l < 32; l++) {
        if (!(present >> l & 1)) continue;
        Lane& lane = warp[l];
        if (lane.op != last.op || lane.mask != last.mask || lane.detail != last.detail)
            return fail("divergent collective", last, last.wait_pc, lane.wait_pc,
                        "waits at a %s with mask 0x%08x, lane %d of the same warp at a %s with mask 0x%08x",
                        name_of(last), last.mask, l, name_of(lane), lane.mask);
        ballot |= (uint32_t)(lane.value != 0) << l;
    }
    switch (last.op) {
        case SYNCWARP: order_lanes(warp, present); break;
        case SHUFFLE: shuffle(warp, present); break;
        case BALLOT: for (int l = 0; l < 32; l++) if (present >> l & 1) warp[l].result = ballot; break;
        case REDUCE: reduce(warp, present); break;
        default: run_matrix_op(warp, last.op, last.detail);
    }
    if (launch.failed) return;
    state.waiting &= ~last.mask;
    for (int l = 0; l < 32; l++) if (present >> l & 1) warp[l].state = READY;
    if (launch.config.counters && present == state.alive) flush_counters(last.thread >> 5);
}

void collective(Op op, int detail, uint32_t mask, uint32_t pc) {
    Lane& me = *current;
    Warp& warp = warp_of(me);
    me.op = op, me.detail = detail, me.mask = mask, me.wait_pc = pc;
    if (!(mask >> lane_of(me) & 1))
        fail("divergent collective", me, pc, 0, "calls a %s whose mask 0x%08x leaves itself out", name_of(me), mask);
    warp.waiting |= 1u << lane_of(me);
    me.state = AT_COLLECTIVE;
    if ((mask & warp.alive & ~warp.waiting) == 0) complete(me);
    if (me.state != READY || launch.failed) leave();
}

// ---- block barriers
int barrier(int line, int predicate, uint32_t pc) {
    Lane& me = *current;
    me.line = line, me.predicate = predicate, me.wait_pc = pc;
    me.state = AT_BARRIER;
    leave();
    return (int)me.result;
}

static void release_barrier() {
    uint64_t total = 0;
    for (uint32_t t = 0; t < launch.threads; t++) {
        if (lanes[t].line != lanes[0].line)
            return fail("divergent barrier", lanes[t], lanes[t].wait_pc, lanes[0].wait_pc,
                        "waits at one __syncthreads while thread 0 waits at another");
        total += lanes[t].predicate != 0;
    }
    now++;
    for (uint32_t t = 0; t < launch.threads; t++) lanes[t].result = total, lanes[t].state = READY;
    if (launch.config.counters) for (uint32_t w = 0; w < launch.warps; w++) flush_counters(w);
}

static void lane_left(Lane& lane) {
    Warp& warp = warp_of(lane);
    warp.alive &= ~(1u << lane_of(lane));
    exited++;
    for (int l = 0; l < 32; l++) {  // those who waited for it may go on: a mask counts lanes that have not left
        Lane& other = first_of(lane)[l];
        if ((warp.waiting >> l & 1) && (other.mask & warp.alive & ~warp.waiting) == 0) return complete(other);
    }
}

static void explain_standstill() {
    Lane *at_barrier = nullptr, *at_collective = nullptr, *gone = nullptr;
    for (uint32_t t = 0; t < launch.threads; t++) {
        if (lanes[t].state == AT_BARRIER && !at_barrier) at_barrier = lanes + t;
        if (lanes[t].state == AT_COLLECTIVE && !at_collective) at_collective = lanes + t;
        if (lanes[t].state == EXITED && !gone) gone = lanes + t;
    }
    if (at_collective && at_barrier)
        fail("deadlock", *at_collective, at_collective->wait_pc, at_barrier->wait_pc,
             "waits at a %s (mask 0x%08x) while thread %u waits at a __syncthreads", name_of(*at_collective),
             at_collective->mask, at_barrier->thread);
    else if (at_barrier)
        fail("divergent barrier", *at_barrier, at_barrier->wait_pc, 0,
             "waits at a __syncthreads that thread (%u, %u, %u) never reaches: it has left the kernel",
             gone->index.x, gone->index.y, gone->index.z);
    else
        fail("deadlock", *at_collective, at_collective->wait_pc, 0, "waits for ever at a %s (mask 0x%08x)",
             name_of(*at_collective), at_collective->mask);
}

static void run_warp(uint32_t w) {
    bool moved = true;
    while (moved && !launch.failed) {
        moved = false;
        for (uint32_t i = w * 32; i < w * 32 + 32 && i < launch.threads && !launch.failed; i++) {
            Lane& lane = lanes[order_of[i]];
            if (lane.state != READY) continue;
            moved = true;
            current = &lane;
            switch_fiber(scheduler, lane.fiber);
            current = nullptr;
            if (lane.state == EXITED && !launch.failed) lane_left(lane);
        }
    }
}

static void start_thread(uint32_t t) {
    Lane& lane = lanes[t];
    const Index& b = launch.config.block;
    lane.stack = launch.config.stacks + (size_t)t * STACK_BYTES;
    lane.index = {t % b.x, t / b.x % b.y, t / b.x / b.y};
    lane.thread = t;
    lane.global = launch.block_id * launch.threads + t;
    lane.state = READY;
    lane.clock = 1;
    memset(lane.seen, 0, sizeof lane.seen);
    lane.fence_time = lane.acquire_time = lane.steps = lane.blocks = lane.committed = 0;
    lane.copies.clear();
    lane.fiber.start(lane.stack, thread_main);
}

static void run_block() {
    block_start = ++now;
    exited = 0;
    for (uint32_t w = 0; w < launch.warps; w++) {
        uint32_t here = launch.threads - w * 32;
        warps[w] = {here >= 32 ? 0xffffffffu : (1u << here) - 1, 0};
    }
    start_block_memory();
    for (uint32_t t = 0; t < launch.threads; t++) start_thread(t);
    while (exited < launch.threads && !launch.failed) {
        uint32_t waiting = 0, ready = 0;
        for (uint32_t w = 0; w < launch.warps; w++) run_warp(launch.config.order == 1 ? launch.warps - 1 - w : w);
        for (uint32_t t = 0; t < launch.threads; t++) {
            waiting += lanes[t].state == AT_BARRIER;
            ready += lanes[t].state == READY;
        }
        if (launch.failed || exited == launch.threads || ready) continue;
        if (waiting == launch.threads) release_barrier();
        else explain_standstill();
    }
    if (launch.config.counters && !launch.failed) for (uint32_t w = 0; w < launch.warps; w++) flush_counters(w);
}

static void choose_order() {  // a permutation inside every warp
    uint32_t seed = launch.config.order;
    for (uint32_t t = 0; t < launch.threads; t++) {
        uint32_t first = t & ~31u, count = launch.threads - first < 32 ? launch.threads - first : 32;
        order_of[t] = seed == 1 ? first + count - 1 - (t - first) : t;
    }
    if (seed < 2) return;
    for (uint32_t t = 0; t < launch.threads; t++) {
        uint32_t first = t & ~31u, count = launch.threads - first < 32 ? launch.threads - first : 32;
        seed = seed * 1664525u + 1013904223u;
        uint32_t other = first + (seed >> 8) % count, kept = order_of[t];
        order_of[t] = order_of[other], order_of[other] = kept;
    }
}
}  // namespace emu

extern "C" __attribute__((visibility("default"))) int emu_launch(
    const emu::Config* config, emu::Region* regions, int num_regions, void** arguments, emu::Fault* fault) {
    using namespace emu;
    if (!lanes) lanes = new Lane[1024];
    const Index g = config->grid, b = config->block;
    uint32_t threads = b.x * b.y * b.z;
    launch = {*config, regions, num_regions, arguments, fault, false, threads, (threads + 31) / 32, 0, g.x * g.y * g.z,
              ++now};
    choose_order();
    bool ready = start_memory();
    start_counters();
    start_products();
    for (uint32_t i = 0; ready && i < launch.num_blocks && !launch.failed; i++) {
        launch.block_id = i;
        block_index = {i % g.x, i / g.x % g.y, i / g.x / g.y};
        run_block();
    }
    end_memory();
    return ready ? launch.failed : -1;
}

// ---- what the kernel's text calls
extern "C" {
using emu::current;
using emu::Index;
Index emu_thread_idx() { return current->index; }
Index emu_block_idx() { return emu::block_index; }
Index emu_block_dim() { return emu::launch.config.block; }
Index emu_grid_dim() { return emu::launch.config.grid; }
int emu_syncthreads(int line, int predicate) { return emu::barrier(line, predicate, EMU_PC); }
void emu_syncwarp(unsigned mask) { emu::collective(emu::SYNCWARP, 0, mask, EMU_PC); }
uint64_t emu_shuffle(int kind, unsigned mask, uint64_t value, int argument, int width) {
    current->value = value, current->argument = argument, current->width = width;
    emu::collective(emu::SHUFFLE, kind, mask, EMU_PC);
    return current->result;
}
unsigned emu_ballot(unsigned mask, int predicate) {
    current->value = predicate != 0;
    emu::collective(emu::BALLOT, 0, mask, EMU_PC);
    return (unsigned)current->result;
}
unsigned emu_reduce(int kind, unsigned mask, unsigned value, int is_signed) {
    current->value = value, current->argument = is_signed;
    emu::collective(emu::REDUCE, kind, mask, EMU_PC);
    return (unsigned)current->result;
}
unsigned emu_activemask() { return emu::warp_of(*current).alive; }
void emu_trap(const char* what) { emu::fail("trap", *current, EMU_PC, 0, "stopped by %s", what); }
}
