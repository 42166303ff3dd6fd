/* The functions that kernels from TVM's LLVM code generator refer to, beside those of threads.c. */
#include "runtime.h"

/* Called by each object's constructor; there is no registry here, as the entry calls the kernels directly. */
int TVMFFIEnvModRegisterSystemLibSymbol(const char *name, void *symbol) {
  (void)name, (void)symbol;
  return 0;
}

/* A kernel that fails returns non-zero as well, and NAME_run says which one it was. */
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { (void)kind, (void)message; }

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  (void)kind, (void)parts, (void)count;
}

#ifdef __wasm__
/* Freed blocks wait in a list for the next request that fits. The module's memory above __heap_base is the loader's, so
   new blocks are whole pages behind everything. */
enum { PAGE = 65536, HEADER = 64 };
typedef struct block {
  struct block *next;
  size_t bytes;
} block;
static block *unused_blocks;

static void *allocate(size_t bytes) {
  for (block **at = &unused_blocks; *at; at = &(*at)->next)
    if ((*at)->bytes >= bytes) {
      block *found = *at;
      *at = found->next;
      return (char *)found + HEADER;
    }
  if (bytes > SIZE_MAX - HEADER - PAGE) return 0;
  size_t pages = (bytes + HEADER + PAGE - 1) / PAGE, before = __builtin_wasm_memory_grow(0, pages);
  if (before == SIZE_MAX) return 0;
  block *fresh = (block *)(before * PAGE);
  fresh->bytes = pages * PAGE - HEADER;
  return (char *)fresh + HEADER;
}

static void release(void *pointer) {
  block *freed = (block *)((char *)pointer - HEADER);
  freed->next = unused_blocks;
  unused_blocks = freed;
}
#else
#define _GNU_SOURCE
#include <stdlib.h>
static void *allocate(size_t bytes) {
  void *pointer;
  return posix_memalign(&pointer, 64, bytes) ? 0 : pointer;
}

static void release(void *pointer) { free(pointer); }
#endif

/* Memory is planned, so only a kernel with a large buffer of its own comes here. */
void *TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  return bytes > SIZE_MAX / 2 ? 0 : allocate(bytes ? (size_t)bytes : 1);
}

int TVMBackendFreeWorkspace(int device_type, int device_id, void *pointer) {
  (void)device_type, (void)device_id;
  if (pointer) release(pointer);
  return 0;
}

#ifdef __wasm__
/* One thread: the whole region is one task. */
int TVMBackendParallelLaunch(graphopt_task task, void *data, int num_task) {
  (void)num_task;
  graphopt_task_env env = {0, 1};
  return task(0, &env, data);
}
#endif
