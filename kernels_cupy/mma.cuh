// The three instructions of the tensor-core kernels, each as one function: cp.async, ldmatrix, mma.m16n8k16.
//
// A matrix fragment is spread over a warp. With group = lane / 4 and pair = lane % 4 * 2, a register of two values
// holds, of the 8 x 8 matrix it belongs to, row `group`, columns `pair` and `pair + 1`:
//   A (16 x 16): a[0] upper left, a[1] lower left, a[2] upper right, a[3] lower right
//   B (16 x 8):  b[0] upper, b[1] lower, both transposed: they hold column `group`, rows `pair` and `pair + 1`
//   D (16 x 8):  d[0], d[1] row `group`, columns `pair` and `pair + 1`; d[2], d[3] the same of row `group + 8`
// sm_75 has no cp.async and half the mma: an ordinary copy and two m16n8k8 stand in. It has no bfloat16 mma at all.
#pragma once

#if SCALAR != 1 && SCALAR != 2
#error "tensor-core kernels take SCALAR 1 (half) or 2 (bfloat16)"
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800 && SCALAR == 2
#error "bfloat16 on tensor cores needs sm_80 or newer"
#endif

// Two floats to two values of the kernel's type in one register, the first one low.
__device__ __forceinline__ unsigned pack(float low, float high) {
#if SCALAR == 1
    __half2 pair = __floats2half2_rn(low, high);
#else
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
#endif
    return *reinterpret_cast<unsigned*>(&pair);
}

// A register of two ones: with it as operand, an mma sums the other operand's rows or columns.
#if SCALAR == 1
constexpr unsigned ONES = 0x3c003c00u;
#else
constexpr unsigned ONES = 0x3f803f80u;
#endif

#ifdef BROS_EMULATOR

typedef const char* shared_t;
__device__ __forceinline__ shared_t shared_address(const void* p) { return (const char*)p; }
template <int OFFSET> __device__ __forceinline__ void copy_async(shared_t shared, const void* global, int source_bytes) {
    emu_cp_async((void*)shared, (const char*)global + OFFSET, 16, source_bytes);
}
__device__ __forceinline__ void copy_commit() { emu_cp_async_commit(); }
template <int GROUPS_LEFT> __device__ __forceinline__ void copy_wait() { emu_cp_async_wait(GROUPS_LEFT); }
template <int OFFSET = 0> __device__ __forceinline__ void load_matrices(unsigned (&r)[4], shared_t row) {
    emu_ldmatrix_x4(r, row + OFFSET);
}
template <int OFFSET = 0> __device__ __forceinline__ void load_matrices_trans(unsigned (&r)[4], shared_t row) {
    emu_ldmatrix_x4_trans(r, row + OFFSET);
}
template <int OFFSET = 0> __device__ __forceinline__ void load_matrices(unsigned (&r)[2], shared_t row) {
    emu_ldmatrix_x2(r, row + OFFSET);
}
template <int OFFSET = 0> __device__ __forceinline__ void load_matrices_trans(unsigned (&r)[2], shared_t row) {
    emu_ldmatrix_x2_trans(r, row + OFFSET);
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned* a, const unsigned* b) {
#if SCALAR == 1
    emu_mma_m16n8k16_f16(d, a, b);
#else
    emu_mma_m16n8k16_bf16(d, a, b);
#endif
}

#else

// An address in shared memory, as ldmatrix takes it: 32 bits, so that stepping through a tile is one addition.
typedef unsigned shared_t;
__device__ __forceinline__ shared_t shared_address(const void* p) { return (shared_t)__cvta_generic_to_shared(p); }

// Starts a copy of 16 bytes from OFFSET past `global` to shared memory; bytes from `source_bytes` on become zero and are
// not read. Here and below, OFFSET is a part of the instruction: it costs none to add.
template <int OFFSET> __device__ __forceinline__ void copy_async(shared_t shared, const void* global, int source_bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1+%3], 16, %2;"
                 :: "r"(shared), "l"(global), "r"(source_bytes), "n"(OFFSET) : "memory");
#else
    const char* source = (const char*)global + OFFSET;
    uint4 piece = source_bytes ? *reinterpret_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(shared), "r"(piece.x), "r"(piece.y), "r"(piece.z), "r"(piece.w) : "memory");
#endif
}
// Closes a group of copies; copy_wait<n> waits until at most the n youngest groups of this thread are under way.
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int GROUPS_LEFT> __device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(GROUPS_LEFT) : "memory");
#endif
}

// Two or four 8 x 8 matrices from shared memory; lane l brings the address of row l % 8 of matrix l / 8, less OFFSET.
template <int OFFSET = 0>
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], shared_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4+%5];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row), "n"(OFFSET) : "memory");
}
template <int OFFSET = 0>
__device__ __forceinline__ void load_matrices_trans(unsigned (&r)[4], shared_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4+%5];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row), "n"(OFFSET) : "memory");
}
template <int OFFSET = 0>
__device__ __forceinline__ void load_matrices(unsigned (&r)[2], shared_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2+%3];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(row), "n"(OFFSET) : "memory");
}
template <int OFFSET = 0>
__device__ __forceinline__ void load_matrices_trans(unsigned (&r)[2], shared_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2+%3];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(row), "n"(OFFSET) : "memory");
}

// d += a * b, of four and two registers.
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned* a, const unsigned* b) {
#if SCALAR == 2
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int half = 0; half < 2; half++)  // left and right half of A with upper and lower half of B
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

#endif
