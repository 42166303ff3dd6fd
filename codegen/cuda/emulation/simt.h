/* Runs CUDA C on the host: what a kernel may use of the language, and a scheduler for the threads of a block.

   Each CUDA thread is a fiber with a stack of its own; blocks run one after another. A fiber runs until it meets a
   barrier, a shuffle or its end, so those are the only places where threads can see each other's progress: the order of
   threads between them is chosen by the caller, and a kernel that needs a barrier which is not there gives different
   results in different orders. Kernels without any of these run as plain loops.

   Checked: a barrier that not all threads reach, or reach at different places; lanes named in a shuffle's mask that do
   not come; writes past the end of shared memory. Shared memory starts as NaN in every block. */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__ static const
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

#define SIMT_VECTOR(T, name)                                                     \
  struct name##1 { T x; };                                                       \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                             \
  struct name##3 { T x, y, z; };                                                 \
  struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) name##4 { T x, y, z, w; }; \
  static inline name##1 make_##name##1(T x) { return {x}; }                      \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; }              \
  static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }      \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR(signed char, char)
SIMT_VECTOR(unsigned char, uchar)
SIMT_VECTOR(short, short)
SIMT_VECTOR(unsigned short, ushort)
SIMT_VECTOR(int, int)
SIMT_VECTOR(unsigned, uint)
SIMT_VECTOR(long long, longlong)
SIMT_VECTOR(unsigned long long, ulonglong)
SIMT_VECTOR(float, float)
SIMT_VECTOR(double, double)

struct dim3 { unsigned x, y, z; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

namespace simt {

enum State : int { READY, AT_BARRIER, AT_WARP, DONE };

struct Fiber {
  void *stack_pointer;
  char *stack;
  State state;
  int line;          /* where it waits */
  unsigned wanted;   /* lanes that a shuffle waits for; 0: whichever come */
  unsigned came;     /* lanes that were there when it went on */
  int source;        /* lane to read from */
  uint64_t sent, received;
};

enum : unsigned { WARP = 32, MAX_THREADS = 1024, STACK_BYTES = 64 << 10, POOL_BYTES = 256 << 10, GUARD_BYTES = 256 };

static Fiber fibers[MAX_THREADS];
static void *scheduler_stack_pointer;
static unsigned current, threads;
static void (*body)(void **);
static void **arguments;
static char message[256];
alignas(64) static unsigned char pool[POOL_BYTES + GUARD_BYTES];

/* Saves the callee-saved registers and the stack pointer, and goes on where `load` was saved. */
extern "C" void simt_switch(void **save, void *load);
#if defined(__x86_64__)
__asm__(".text\n.p2align 4\nsimt_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nretq\n");
enum : unsigned { SAVED_WORDS = 6, RETURN_WORD = 6, FRAME_WORDS = 8 };
#elif defined(__aarch64__)
__asm__(".text\n.p2align 4\nsimt_switch:\n"
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
        "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
        "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
        "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
        "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
        "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
        "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\nret\n");
enum : unsigned { RETURN_WORD = 11, FRAME_WORDS = 20 };
#else
#error "the emulation has a context switch for x86-64 and AArch64 only"
#endif

static inline void place(unsigned thread) {
  current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
}

static inline void wait(State state, int line) {
  Fiber &self = fibers[current];
  self.state = state;
  self.line = line;
  simt_switch(&self.stack_pointer, scheduler_stack_pointer);
}

static void run_fiber() {
  body(arguments);
  wait(DONE, 0);
  abort(); /* nobody resumes a fiber that is done */
}

static void start(Fiber &fiber) {
  if (!fiber.stack) fiber.stack = (char *)aligned_alloc(64, STACK_BYTES);
  void **frame = (void **)(fiber.stack + STACK_BYTES) - FRAME_WORDS;
  memset(frame, 0, FRAME_WORDS * sizeof *frame);
  frame[RETURN_WORD] = (void *)run_fiber;
  fiber.stack_pointer = frame;
  fiber.state = READY;
}

/* Lets lanes of a warp go on once every lane of it waits or is done: those at the first line where some wait. */
static bool resume_warp(unsigned first, bool &failed) {
  unsigned end = first + WARP < threads ? first + WARP : threads;
  int line = 0;
  for (unsigned i = first; i < end; i++) {
    if (fibers[i].state == READY) return false;
    if (fibers[i].state == AT_WARP && (!line || fibers[i].line < line)) line = fibers[i].line;
  }
  if (!line) return false;
  unsigned came = 0;
  for (unsigned i = first; i < end; i++)
    if (fibers[i].state == AT_WARP && fibers[i].line == line) came |= 1u << (i - first);
  for (unsigned i = first; i < end; i++) {
    Fiber &lane = fibers[i];
    if (!(came >> (i - first) & 1)) continue;
    unsigned known = end - first == WARP ? ~0u : (1u << (end - first)) - 1;
    if (unsigned missing = lane.wanted & known & ~came) {
      snprintf(message, sizeof message, "line %d: lanes %#x are in the mask of a warp operation and did not come", line,
               missing);
      failed = true;
      return false;
    }
    bool there = lane.source >= 0 && (came >> lane.source & 1);
    lane.received = there ? fibers[first + lane.source].sent : ~(uint64_t)0; /* undefined on a GPU: NaN here */
    lane.came = came;
    lane.state = READY;
  }
  return true;
}

static bool resume_barrier(unsigned done, bool &failed) {
  int line = 0;
  for (unsigned i = 0; i < threads; i++) {
    if (fibers[i].state != AT_BARRIER) continue;
    if (line && fibers[i].line != line) {
      snprintf(message, sizeof message, "threads wait at different barriers, lines %d and %d", line, fibers[i].line);
      failed = true;
      return false;
    }
    line = fibers[i].line;
  }
  if (done) {
    snprintf(message, sizeof message, "line %d: %u threads ended without reaching a barrier", line, done);
    failed = true;
    return false;
  }
  for (unsigned i = 0; i < threads; i++) fibers[i].state = READY;
  return true;
}

static bool run_block_with_fibers(unsigned order, uint32_t &random) {
  static uint16_t sequence[MAX_THREADS];
  for (unsigned i = 0; i < threads; i++) {
    sequence[i] = (uint16_t)(order == 1 ? threads - 1 - i : i);
    start(fibers[i]);
  }
  for (;;) {
    if (order > 1)
      for (unsigned i = threads - 1; i > 0; i--) {
        random ^= random << 13, random ^= random >> 17, random ^= random << 5;
        unsigned j = random % (i + 1);
        uint16_t swap = sequence[i];
        sequence[i] = sequence[j], sequence[j] = swap;
      }
    for (unsigned i = 0; i < threads; i++)
      if (fibers[sequence[i]].state == READY) {
        place(sequence[i]);
        simt_switch(&scheduler_stack_pointer, fibers[current].stack_pointer);
      }
    bool failed = false, resumed = false;
    for (unsigned first = 0; first < threads; first += WARP) resumed |= resume_warp(first, failed);
    if (failed) return false;
    if (resumed) continue;
    unsigned done = 0;
    for (unsigned i = 0; i < threads; i++) done += fibers[i].state == DONE;
    if (done == threads) return true;
    if (!resume_barrier(done, failed)) return false;
  }
}

template <class Body>
static int launch(const unsigned *geometry, unsigned static_shared, bool fibers_needed, void **args, unsigned order) {
  gridDim = {geometry[0], geometry[1], geometry[2]};
  blockDim = {geometry[3], geometry[4], geometry[5]};
  threads = blockDim.x * blockDim.y * blockDim.z;
  unsigned shared = static_shared + geometry[6], blocks = gridDim.x * gridDim.y * gridDim.z;
  if (threads == 0 || threads > MAX_THREADS || shared > POOL_BYTES) {
    snprintf(message, sizeof message, "%u threads and %u bytes of shared memory in a block", threads, shared);
    return 1;
  }
  body = Body::run, arguments = args;
  uint32_t random = order * 2654435761u | 1;
  memset(pool + shared, 0xA5, GUARD_BYTES);
  for (unsigned n = 0; n < blocks; n++) {
    unsigned block = order == 1 ? blocks - 1 - n : n;
    blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / (gridDim.x * gridDim.y)};
    memset(pool, 0xFF, shared);
    if (!fibers_needed)
      for (unsigned i = 0; i < threads; i++) place(order == 1 ? threads - 1 - i : i), Body::run(args);
    else if (!run_block_with_fibers(order, random))
      return 1;
    for (unsigned i = 0; i < GUARD_BYTES; i++)
      if (pool[shared + i] != 0xA5) {
        snprintf(message, sizeof message, "block %u wrote %u bytes past the end of its shared memory", block, i + 1);
        return 1;
      }
  }
  return 0;
}

static inline unsigned lane() { return current % WARP; }

template <class T> static inline T exchange(int line, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most eight bytes");
  Fiber &self = fibers[current];
  self.sent = 0;
  memcpy(&self.sent, &value, sizeof value);
  self.source = source, self.wanted = mask;
  unsigned me = current;
  wait(AT_WARP, line);
  memcpy(&value, &fibers[me].received, sizeof value);
  return value;
}

static inline unsigned active(int line) {
  unsigned me = current;
  fibers[me].wanted = 0, fibers[me].source = -1;
  wait(AT_WARP, line);
  return fibers[me].came;
}

static inline void barrier(int line) { wait(AT_BARRIER, line); }

static inline int segment(int width) { return (int)lane() & ~(width - 1); }

template <class T> static inline T shuffle(int line, unsigned mask, T value, int source, int width = 32) {
  return exchange(line, mask, value, segment(width) | (source & (width - 1)));
}
template <class T> static inline T shuffle_down(int line, unsigned mask, T value, unsigned by, int width = 32) {
  int own = (int)lane(), other = own + (int)by;
  return exchange(line, mask, value, other < segment(width) + width ? other : own);
}
template <class T> static inline T shuffle_up(int line, unsigned mask, T value, unsigned by, int width = 32) {
  int own = (int)lane(), other = own - (int)by;
  return exchange(line, mask, value, other >= segment(width) ? other : own);
}
template <class T> static inline T shuffle_xor(int line, unsigned mask, T value, int with, int width = 32) {
  int own = (int)lane(), other = own ^ with;
  return exchange(line, mask, value, other < segment(width) + width ? other : own);
}

}  // namespace simt

#define __syncthreads() simt::barrier(__LINE__)
#define __syncwarp(...) ((void)simt::active(__LINE__))
#define __activemask() simt::active(__LINE__)
#define __shfl_sync(...) simt::shuffle(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) simt::shuffle_up(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shuffle_xor(__LINE__, __VA_ARGS__)

static inline void __threadfence() {}
static inline void __threadfence_block() {}
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T atomicAdd(T *p, T v) { T old = *p; *p = old + v; return old; }
template <class T> static inline T atomicMax(T *p, T v) { T old = *p; *p = old > v ? old : v; return old; }
template <class T> static inline T atomicMin(T *p, T v) { T old = *p; *p = old < v ? old : v; return old; }

static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
#define SIMT_MIN_MAX(T)                                        \
  static inline T max(T a, T b) { return a > b ? a : b; }      \
  static inline T min(T a, T b) { return a < b ? a : b; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
SIMT_MIN_MAX(signed char)

static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
/* The C library has functions of these names, hidden from programs but not from its own headers. */
#define __expf expf
#define __exp10f(x) powf(10, x)
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __powf powf
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
static inline float __fdividef(float a, float b) { return a / b; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
/* CUDA overloads these for float; C's names take doubles. */
#define SIMT_FLOAT(name) static inline float name(float x) { return name##f(x); }
SIMT_FLOAT(exp)
SIMT_FLOAT(log)
SIMT_FLOAT(sqrt)
SIMT_FLOAT(tanh)
SIMT_FLOAT(erf)
SIMT_FLOAT(sin)
SIMT_FLOAT(cos)
SIMT_FLOAT(floor)
SIMT_FLOAT(ceil)
SIMT_FLOAT(fabs)
