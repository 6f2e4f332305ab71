// A fiber is a CUDA thread: a stack, and the point where it stopped. Switching costs a dozen instructions.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emu {
constexpr size_t STACK_BYTES = 128 * 1024;  // of which stacks.py protects the lowest part

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
void switch_stack(void** save, void* load) __asm__("emu_switch_stack");
__asm__(
    ".text\n"
    "emu_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
struct Fiber {
    void* at = nullptr;
    void start(char* stack, void (*entry)()) {
        void** top = (void**)(stack + STACK_BYTES);
        top[-1] = nullptr;       // the entry never returns; after `ret` the stack is aligned as after a call
        top[-2] = (void*)entry;
        at = top - 8;            // six registers below
    }
};
inline void switch_fiber(Fiber& from, Fiber& to) { switch_stack(&from.at, to.at); }
#elif defined(__aarch64__) && !defined(EMU_UCONTEXT)
void switch_stack(void** save, void* load) __asm__("emu_switch_stack");
__asm__(
    ".text\n.balign 4\n"
    "emu_switch_stack:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
struct Fiber {
    void* at = nullptr;
    void start(char* stack, void (*entry)()) {
        void** saved = (void**)(stack + STACK_BYTES - 160);
        for (int i = 0; i < 20; i++) saved[i] = nullptr;
        saved[11] = (void*)entry;  // x30: where `ret` goes
        at = saved;
    }
};
inline void switch_fiber(Fiber& from, Fiber& to) { switch_stack(&from.at, to.at); }
#else
}  // namespace emu
#include <ucontext.h>
namespace emu {
struct Fiber {
    ucontext_t context;
    void start(char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
};
inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif
}  // namespace emu
