// Everything the parts of the runtime share: the launch as Python describes it, and the block now running.
// Blocks run one after the other; inside one, exactly one thread runs at a time, so nothing here needs a lock.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <unordered_map>
#include <vector>

#include "fibers.h"

extern "C" void emu_entry(void** arguments);  // in the kernel's object

namespace emu {
struct Index { unsigned x, y, z; };

// ---- what Python fills in (emulator.py mirrors these)
struct Config {
    Index grid, block;
    uint32_t shared_bytes;
    uint32_t checks, counters, early_copies;
    uint32_t order;             // of a block's threads: 0 ascending, 1 descending, else the seed of a shuffle
    uint32_t record_limit;
    uint32_t step_limit;        // basic blocks that a thread may execute: one that executes more hangs
    const int32_t* serves;      // [blocks of the grid] the sequence each block serves, -1 for any; may be null
    char* stacks;               // [threads of a block] of STACK_BYTES each
};
struct Cell;
struct Region {                 // one tensor argument, or the union of overlapping ones
    char* base;
    uint64_t bytes;
    uint64_t slot_bytes;
    const int32_t* readable;    // [slots] -2 by anyone, -1 by nobody, else by blocks that serve this sequence; or null
    const int32_t* writable;
    Cell* cells;                // set by the launch
    uint32_t granule;           // bytes a cell stands for
    uint32_t written;           // out: something was stored
    int32_t argument;           // its position in the launch
};
struct Fault {
    char what[32];
    char message[480];
    uint64_t pc, other_pc;      // offsets into the module, 0 for none
    Index block, thread;
};

// ---- who touched a byte last, and when. Time counts barriers over the whole life of the module, never backwards.
struct Cell {
    uint32_t write_time, write_thread, write_clock, write_pc;
    uint32_t read_time, read_thread, read_clock, read_pc;
    uint32_t read_lanes;        // of read_thread's warp, not ordered among themselves
    uint32_t copy_time;         // a cp.async into this byte was issued then and has not been waited for; 0 for none
    uint32_t copy_pc;
    uint8_t write_atomic, read_warps, read_blocks, unused;
};

enum State : uint8_t { READY, AT_BARRIER, AT_COLLECTIVE, EXITED };
enum Kind { READ, WRITE, ATOMIC };
enum Op { SYNCWARP, SHUFFLE, BALLOT, REDUCE, LDMATRIX, MMA };

struct Copy { char* to; const char* from; int bytes, source_bytes; uint32_t group; uint32_t pc; };

struct Lane {
    Fiber fiber;
    char* stack = nullptr;
    Index index;
    uint32_t thread;            // in the block
    uint32_t global;            // in the launch
    State state;
    int line, predicate;        // at a barrier
    Op op;                      // at a collective
    int detail, argument, width;
    uint32_t mask;
    uint64_t value, result;
    const void *in_a, *in_b;
    void* out;
    uint32_t wait_pc;
    uint32_t clock, seen[32];   // vector clock inside the warp: what __syncwarp ordered before this lane
    uint32_t fence_time, acquire_time;
    uint32_t steps;             // accesses so far
    uint32_t blocks;            // basic blocks executed so far
    std::vector<Copy> copies;
    uint32_t committed;
    std::vector<uint32_t> occurrences;  // per site, for the counters
};
struct Warp { uint32_t alive, waiting; };

struct Launch {
    Config config;
    Region* regions;
    int num_regions;
    void** arguments;
    Fault* fault;
    bool failed;
    uint32_t threads, warps, block_id, num_blocks;
    uint32_t start_time;        // of the launch
};

extern Launch launch;
extern Lane* lanes;
extern Lane* current;           // null while the scheduler runs
extern Warp warps[32];
extern Index block_index;
extern uint32_t now, block_start;
extern Fiber scheduler;

inline int lane_of(const Lane& l) { return l.thread & 31; }
inline Warp& warp_of(const Lane& l) { return warps[l.thread >> 5]; }

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[];
extern "C" __attribute__((visibility("hidden"))) char _end[];
inline uint32_t offset_of(const void* pc) { return (uint32_t)((const char*)pc - __ehdr_start) - 1; }
#define EMU_PC emu::offset_of(__builtin_return_address(0))

// Ends the launch: fills in the fault and leaves the fiber for good.
__attribute__((format(printf, 5, 6))) void fail(const char* what, const Lane& who, uint32_t pc, uint32_t other_pc,
                                                const char* format, ...);
void leave();                   // back to the scheduler

// ---- parts
bool start_memory();            // per launch; false if there is no memory for the cells
void end_memory();
void start_block_memory();
void access(const void* address, uint32_t size, Kind kind, uint32_t pc, bool aligned);
void check_copy(const Copy& copy, bool issued);  // the shared side of a cp.async: issued, or landed
void order_atomic(uint64_t address);
bool in_shared(const void* address);
void record_synchronisation();  // a block barrier
void finish_copies(Lane& lane, uint32_t below_group);
void run_matrix_op(Lane* warp_lanes, Op op, int detail);
void start_products();

void start_counters();
void count(bool shared, Kind kind, uint64_t address, uint32_t size, uint32_t pc, int argument, uint64_t offset);
void count_matrix(const Lane* warp_lanes, int matrices, uint32_t pc);
void flush_counters(uint32_t warp);
}  // namespace emu
