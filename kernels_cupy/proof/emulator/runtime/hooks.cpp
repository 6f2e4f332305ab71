// What -fsanitize=thread calls before every load and store of the kernel, and -fsanitize-coverage=trace-pc in every
// basic block. Their own runtimes are not linked; this is it.
#include "state.h"

#define HOOK extern "C" void
#define EMU_SIZES(X) X(1) X(2) X(4) X(8) X(16)
#define EMU_DEFINE(n)                                                                                   \
    HOOK __tsan_read##n(void* a) { emu::access(a, n, emu::READ, EMU_PC, true); }                        \
    HOOK __tsan_write##n(void* a) { emu::access(a, n, emu::WRITE, EMU_PC, true); }                      \
    HOOK __tsan_unaligned_read##n(void* a) { emu::access(a, n, emu::READ, EMU_PC, false); }             \
    HOOK __tsan_unaligned_write##n(void* a) { emu::access(a, n, emu::WRITE, EMU_PC, false); }           \
    HOOK __tsan_volatile_read##n(void* a) { emu::access(a, n, emu::READ, EMU_PC, true); }               \
    HOOK __tsan_volatile_write##n(void* a) { emu::access(a, n, emu::WRITE, EMU_PC, true); }             \
    HOOK __tsan_read_write##n(void* a) {                                                                \
        emu::access(a, n, emu::READ, EMU_PC, true);                                                     \
        emu::access(a, n, emu::WRITE, EMU_PC, true);                                                    \
    }
EMU_SIZES(EMU_DEFINE)
HOOK __tsan_read_range(void* a, unsigned long n) { emu::access(a, (uint32_t)n, emu::READ, EMU_PC, false); }
HOOK __tsan_write_range(void* a, unsigned long n) { emu::access(a, (uint32_t)n, emu::WRITE, EMU_PC, false); }
HOOK __sanitizer_cov_trace_pc() {
    using namespace emu;
    if (current && ++current->blocks > launch.config.step_limit)
        fail("endless loop", *current, EMU_PC, 0,
             "executed %u basic blocks and goes on; Emulator(step_limit=...) allows more", launch.config.step_limit);
}
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_vptr_update(void**, void*) {}
extern "C" void* __tsan_memcpy(void* to, const void* from, unsigned long n) {
    emu::access(from, (uint32_t)n, emu::READ, EMU_PC, false);
    emu::access(to, (uint32_t)n, emu::WRITE, EMU_PC, false);
    return memcpy(to, from, n);
}
extern "C" void* __tsan_memmove(void* to, const void* from, unsigned long n) {
    emu::access(from, (uint32_t)n, emu::READ, EMU_PC, false);
    emu::access(to, (uint32_t)n, emu::WRITE, EMU_PC, false);
    return memmove(to, from, n);
}
extern "C" void* __tsan_memset(void* to, int byte, unsigned long n) {
    emu::access(to, (uint32_t)n, emu::WRITE, EMU_PC, false);
    return memset(to, byte, n);
}
