// What a .cu file finds in place of the CUDA compiler's own words, when g++ compiles it: keywords, vector types,
// threadIdx, barriers, shuffles, atomics, and the hooks that mma.cuh calls under BROS_EMULATOR.
// Loads and stores need no word here: -fsanitize=thread reports each one to runtime/hooks.cpp.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {  // declared here, because <math.h> takes longer to read than a kernel to compile
float expf(float), exp2f(float), logf(float), log2f(float), sqrtf(float), fabsf(float), floorf(float), ceilf(float);
float fmaxf(float, float), fminf(float, float), fmaf(float, float, float), powf(float, float), tanhf(float);
float sinf(float), cosf(float), rintf(float), roundf(float), truncf(float), fmodf(float, float), ldexpf(float, int);
int abs(int), printf(const char*, ...);
void* memcpy(void*, const void*, size_t);
}

#define BROS_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __constant__ static const
#define __grid_constant__
#define EMU_INLINE static inline __attribute__((always_inline, unused))

// ---- vector types: -fno-tree-sra keeps a copy of one a single access, as the GPU makes it
#define EMU_VECTORS(T, N, A1, A2, A4)                              \
    struct __align__(A1) N##1 { T x; };                            \
    struct __align__(A2) N##2 { T x, y; };                         \
    struct N##3 { T x, y, z; };                                    \
    struct __align__(A4) N##4 { T x, y, z, w; };                   \
    EMU_INLINE N##2 make_##N##2(T x, T y) { return {x, y}; }       \
    EMU_INLINE N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; } \
    EMU_INLINE N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(float, float, 4, 8, 16)
EMU_VECTORS(int, int, 4, 8, 16)
EMU_VECTORS(unsigned, uint, 4, 8, 16)
EMU_VECTORS(short, short, 2, 4, 8)
EMU_VECTORS(unsigned short, ushort, 2, 4, 8)
EMU_VECTORS(signed char, char, 1, 2, 4)
EMU_VECTORS(unsigned char, uchar, 1, 2, 4)
EMU_VECTORS(double, double, 8, 16, 16)
EMU_VECTORS(long long, longlong, 8, 16, 16)
struct dim3 { unsigned x, y, z; };

// ---- the runtime (runtime/*.cpp), compiled once and linked to every kernel
extern "C" {
__attribute__((const)) uint3 emu_thread_idx();
__attribute__((const)) uint3 emu_block_idx();
__attribute__((const)) uint3 emu_block_dim();
__attribute__((const)) uint3 emu_grid_dim();
int emu_syncthreads(int line, int predicate);  // how many threads of the block brought a predicate that is not 0
void emu_syncwarp(unsigned mask);
enum { EMU_IDX, EMU_UP, EMU_DOWN, EMU_XOR };
uint64_t emu_shuffle(int kind, unsigned mask, uint64_t value, int argument, int width);
unsigned emu_ballot(unsigned mask, int predicate);
enum { EMU_ADD, EMU_MIN, EMU_MAX, EMU_AND, EMU_OR };
unsigned emu_reduce(int kind, unsigned mask, unsigned value, int is_signed);
unsigned emu_activemask();
void emu_threadfence(int whole_device);
void emu_atomic(void* address, int bytes);  // checks and orders; the caller then does plain arithmetic on *address
void emu_trap(const char* what);
void* emu_dynamic_shared();
void* emu_static_shared(int id, unsigned long bytes);

// ---- hooks for mma.cuh. Every lane of the warp must come; pointers to registers are per lane.
void emu_ldmatrix_x1(unsigned r[1], const void* smem_row);
void emu_ldmatrix_x1_trans(unsigned r[1], const void* smem_row);
void emu_ldmatrix_x2(unsigned r[2], const void* smem_row);
void emu_ldmatrix_x2_trans(unsigned r[2], const void* smem_row);
void emu_ldmatrix_x4(unsigned r[4], const void* smem_row);
void emu_ldmatrix_x4_trans(unsigned r[4], const void* smem_row);
void emu_mma_m16n8k16_f16(float d[4], const unsigned a[4], const unsigned b[2]);   // d += a * b
void emu_mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2]);  // d += a * b
void emu_cp_async(void* smem, const void* gmem, int bytes, int src_bytes);  // 4, 8 or 16; zeros after src_bytes
void emu_cp_async_commit();
void emu_cp_async_wait(int groups_left);
}

#define threadIdx (emu_thread_idx())
#define blockIdx (emu_block_idx())
#define blockDim (emu_block_dim())
#define gridDim (emu_grid_dim())
#define warpSize 32

// ---- barriers, votes, shuffles
#define __syncthreads() ((void)emu_syncthreads(__LINE__, 0))
#define __syncthreads_count(p) emu_syncthreads(__LINE__, (p) != 0)
#define __syncthreads_or(p) (emu_syncthreads(__LINE__, (p) != 0) != 0)
#define __syncthreads_and(p) (emu_syncthreads(__LINE__, !(p)) == 0)
EMU_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { emu_syncwarp(mask); }
EMU_INLINE unsigned __ballot_sync(unsigned mask, int p) { return emu_ballot(mask, p); }
EMU_INLINE int __any_sync(unsigned mask, int p) { return emu_ballot(mask, p) != 0; }
EMU_INLINE int __all_sync(unsigned mask, int p) { return emu_ballot(mask, !p) == 0; }
EMU_INLINE unsigned __activemask() { return emu_activemask(); }
template <typename T>
EMU_INLINE T emu_shuffle_any(int kind, unsigned mask, T value, int argument, int width) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = emu_shuffle(kind, mask, bits, argument, width);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
#define EMU_SHUFFLE(name, kind)                                                    \
    template <typename T>                                                          \
    EMU_INLINE T name(unsigned mask, T value, int argument, int width = 32) {      \
        return emu_shuffle_any(kind, mask, value, argument, width);                \
    }
EMU_SHUFFLE(__shfl_sync, EMU_IDX)
EMU_SHUFFLE(__shfl_up_sync, EMU_UP)
EMU_SHUFFLE(__shfl_down_sync, EMU_DOWN)
EMU_SHUFFLE(__shfl_xor_sync, EMU_XOR)
#define EMU_REDUCE(name, kind)                                                                                     \
    EMU_INLINE int name(unsigned mask, int value) { return (int)emu_reduce(kind, mask, (unsigned)value, 1); }      \
    EMU_INLINE unsigned name(unsigned mask, unsigned value) { return emu_reduce(kind, mask, value, 0); }
EMU_REDUCE(__reduce_add_sync, EMU_ADD)
EMU_REDUCE(__reduce_min_sync, EMU_MIN)
EMU_REDUCE(__reduce_max_sync, EMU_MAX)
EMU_REDUCE(__reduce_and_sync, EMU_AND)
EMU_REDUCE(__reduce_or_sync, EMU_OR)

// ---- atomics: fibers never stop inside one, so plain arithmetic is atomic; only the hook must know
#define EMU_NO_LOG __attribute__((noinline, no_sanitize("thread"), unused))
#define EMU_ATOMIC(name, expression)                                       \
    template <typename T> static EMU_NO_LOG T emu_do_##name(T* p, T v) {   \
        T old = *p;                                                        \
        *p = (expression);                                                 \
        return old;                                                        \
    }                                                                      \
    template <typename T, typename V> EMU_INLINE T name(T* p, V v) {       \
        emu_atomic(p, sizeof(T));                                          \
        return emu_do_##name<T>(p, (T)v);                                  \
    }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicMax, old > v ? old : v)
EMU_ATOMIC(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicAnd, old & v)
EMU_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <typename T> static EMU_NO_LOG T emu_do_cas(T* p, T expected, T desired) {
    T old = *p;
    if (old == expected) *p = desired;
    return old;
}
template <typename T, typename A, typename B> EMU_INLINE T atomicCAS(T* p, A expected, B desired) {
    emu_atomic(p, sizeof(T));
    return emu_do_cas<T>(p, (T)expected, (T)desired);
}
EMU_INLINE void __threadfence() { emu_threadfence(1); }
EMU_INLINE void __threadfence_block() { emu_threadfence(0); }

// ---- arithmetic and bits
template <typename A, typename B> EMU_INLINE auto max(A a, B b) -> decltype(a + b) { return a > b ? a : b; }
template <typename A, typename B> EMU_INLINE auto min(A a, B b) -> decltype(a + b) { return a < b ? a : b; }
#define __expf expf  // macros, because the C library has functions of some of these names
#define __exp2f exp2f
#define __logf logf
#define __log2f log2f
#define rsqrtf emu_rsqrtf
EMU_INLINE float __fdividef(float a, float b) { return a / b; }
EMU_INLINE float __frcp_rn(float x) { return 1.0f / x; }
EMU_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMU_INLINE float __fmul_rn(float a, float b) { return a * b; }
EMU_INLINE float __fadd_rn(float a, float b) { return a + b; }
EMU_INLINE float emu_rsqrtf(float x) { return 1.0f / sqrtf(x); }
EMU_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
EMU_INLINE int __ffs(int x) { return __builtin_ffs(x); }
EMU_INLINE int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
EMU_INLINE int __float_as_int(float x) { int r; memcpy(&r, &x, 4); return r; }
EMU_INLINE unsigned __float_as_uint(float x) { unsigned r; memcpy(&r, &x, 4); return r; }
EMU_INLINE float __int_as_float(int x) { float r; memcpy(&r, &x, 4); return r; }
EMU_INLINE float __uint_as_float(unsigned x) { float r; memcpy(&r, &x, 4); return r; }
template <typename T> EMU_INLINE T __ldg(const T* p) { return *p; }
template <typename T> EMU_INLINE T __ldcs(const T* p) { return *p; }
template <typename T> EMU_INLINE T __ldcg(const T* p) { return *p; }
template <typename T> EMU_INLINE T __ldca(const T* p) { return *p; }
template <typename T> EMU_INLINE T __ldlu(const T* p) { return *p; }
template <typename T> EMU_INLINE void __stcs(T* p, T v) { *p = v; }
template <typename T> EMU_INLINE void __stcg(T* p, T v) { *p = v; }
EMU_INLINE void __trap() { emu_trap("__trap()"); }
#undef assert
#define assert(condition) ((condition) ? (void)0 : emu_trap("assert(" #condition ")"))

// ---- how the runtime starts the kernel: arguments come as an array of pointers to values
template <int... I> struct EmuIndices {};
template <int N, int... I> struct EmuMakeIndices : EmuMakeIndices<N - 1, N - 1, I...> {};
template <int... I> struct EmuMakeIndices<0, I...> { typedef EmuIndices<I...> type; };
template <typename T> struct EmuKind { static const char value = 'v'; };
template <typename T> struct EmuKind<T*> { static const char value = 'p'; };
template <> struct EmuKind<int> { static const char value = 'i'; };
template <> struct EmuKind<float> { static const char value = 'f'; };
template <typename... A, int... I>
__attribute__((no_sanitize("thread"))) static void emu_call(void (*kernel)(A...), void** arguments, EmuIndices<I...>) {
    kernel(*(A*)arguments[I]...);
}
template <typename... A> static void emu_start(void (*kernel)(A...), void** arguments) {
    emu_call(kernel, arguments, typename EmuMakeIndices<sizeof...(A)>::type());
}
template <typename... A> static const char* emu_kinds_of(void (*)(A...)) {
    static const char kinds[] = {EmuKind<A>::value..., 0};  // one letter a parameter: p, i, f, or v for any other
    return kinds;
}
#define EMU_KERNEL(name)                                                                             \
    extern "C" void emu_entry(void** arguments) { emu_start(name, arguments); }                      \
    extern "C" __attribute__((visibility("default"))) const char* emu_parameters() { return emu_kinds_of(name); }
