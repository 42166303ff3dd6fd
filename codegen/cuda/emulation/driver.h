/* A CUDA driver without a GPU: the functions that the launcher uses, on host memory and emulated kernels. Linked with
   those as libcuda.so.1, it lets a compiled model's library run as it is: loading, uploading, every launch, copying out.

   Environment:
     GRAPHOPT_EMULATED_CAPABILITY=9.0            what the device says it is; 99.0 by default, anything's PTX runs on it
     GRAPHOPT_EMULATED_ORDER=N                   order of threads: 0 forward, 1 reverse, N > 1 seeds a shuffle
     GRAPHOPT_EMULATED_FAULT=cuMemAlloc_v2:2:2   the second call of that function gives error 2
     GRAPHOPT_EMULATED_LOG=FILE                  a line per call is appended */
#pragma once
#include <stdarg.h>

namespace driver {

struct Kernel {
  const char *name;
  int32_t (*run)(const uint32_t *geometry, void **arguments, uint32_t order);
};

/* Device memory: what was allocated, so that an address outside of it is noticed. */
struct Block {
  char *start;
  size_t bytes;
  Block *next;
};

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719 };

static Block *blocks;
static int module_kind, context_kind, stream_kind;

static void log(const char *format, ...) {
  const char *path = getenv("GRAPHOPT_EMULATED_LOG");
  FILE *file = path ? fopen(path, "a") : nullptr;
  if (!file) return;
  va_list arguments;
  va_start(arguments, format);
  vfprintf(file, format, arguments);
  va_end(arguments);
  fputc('\n', file);
  fclose(file);
}

/* The error that a call shall give, counted per function. */
static int fault(const char *function, int &calls) {
  calls++;
  const char *wanted = getenv("GRAPHOPT_EMULATED_FAULT");
  size_t length = strlen(function);
  if (!wanted || strncmp(wanted, function, length) != 0 || wanted[length] != ':') return 0;
  char *end;
  long nth = strtol(wanted + length + 1, &end, 10);
  return nth == calls && *end == ':' ? atoi(end + 1) : 0;
}

static bool inside(uint64_t address, size_t bytes) {
  for (Block *b = blocks; b; b = b->next)
    if ((char *)address >= b->start && (char *)address + bytes <= b->start + b->bytes) return true;
  return false;
}

}  // namespace driver

extern "C" const driver::Kernel emulated_kernels[]; /* ends with a null name */

#define CU(name, ...)                                        \
  extern "C" int name(__VA_ARGS__);                          \
  extern "C" int name(__VA_ARGS__)
#define MAY_FAIL(name)                                       \
  static int calls_;                                         \
  if (int code_ = driver::fault(#name, calls_)) return code_

CU(cuInit, unsigned) { MAY_FAIL(cuInit); return 0; }
CU(cuDeviceGetCount, int *count) { MAY_FAIL(cuDeviceGetCount); *count = 1; return 0; }
CU(cuDeviceGet, int *device, int ordinal) { MAY_FAIL(cuDeviceGet); *device = ordinal; return 0; }
CU(cuDeviceGetAttribute, int *value, int attribute, int) {
  MAY_FAIL(cuDeviceGetAttribute);
  const char *capability = getenv("GRAPHOPT_EMULATED_CAPABILITY");
  int major = 99, minor = 0;
  if (capability && sscanf(capability, "%d.%d", &major, &minor) != 2) return driver::INVALID_VALUE;
  *value = attribute == 75 ? major : minor;
  return 0;
}
CU(cuDevicePrimaryCtxRetain, void **context, int) {
  MAY_FAIL(cuDevicePrimaryCtxRetain);
  *context = &driver::context_kind;
  return 0;
}
CU(cuDevicePrimaryCtxRelease_v2, int) {
  int leaks = 0;
  for (driver::Block *b = driver::blocks; b; b = b->next) leaks++;
  driver::log("release %d blocks left", leaks);
  return 0;
}
CU(cuCtxPushCurrent_v2, void *) { return 0; }
CU(cuCtxPopCurrent_v2, void **context) { *context = &driver::context_kind; return 0; }
CU(cuModuleLoadDataEx, void **module, const void *image, unsigned, int *, void **) {
  MAY_FAIL(cuModuleLoadDataEx);
  bool cubin = memcmp(image, "\177ELF", 4) == 0;
  if (!cubin && !strstr((const char *)image, ".target sm_")) return driver::INVALID_VALUE;
  driver::log("load %s", cubin ? "cubin" : "ptx");
  *module = &driver::module_kind;
  return 0;
}
CU(cuModuleUnload, void *) { return 0; }
CU(cuModuleGetFunction, void **function, void *, const char *name) {
  MAY_FAIL(cuModuleGetFunction);
  for (const driver::Kernel *k = emulated_kernels; k->name; k++)
    if (strcmp(k->name, name) == 0) {
      *function = (void *)k;
      return 0;
    }
  return driver::NOT_FOUND;
}
CU(cuFuncSetAttribute, void *, int, int) { MAY_FAIL(cuFuncSetAttribute); return 0; }
CU(cuMemAlloc_v2, uint64_t *address, size_t bytes) {
  MAY_FAIL(cuMemAlloc_v2);
  size_t rounded = (bytes + 255) & ~(size_t)255;
  driver::Block *block = (driver::Block *)malloc(sizeof *block);
  char *start = (char *)aligned_alloc(256, rounded);
  if (!block || !start) return driver::OUT_OF_MEMORY;
  memset(start, 0xFF, rounded); /* NaN, until something is written */
  *block = {start, bytes, driver::blocks};
  driver::blocks = block;
  *address = (uint64_t)start;
  driver::log("alloc %zu", bytes);
  return 0;
}
CU(cuMemFree_v2, uint64_t address) {
  for (driver::Block **at = &driver::blocks; *at; at = &(*at)->next)
    if ((uint64_t)(*at)->start == address) {
      driver::Block *gone = *at;
      *at = gone->next;
      free(gone->start);
      free(gone);
      return 0;
    }
  return driver::INVALID_VALUE;
}
CU(cuMemcpyHtoDAsync_v2, uint64_t to, const void *from, size_t bytes, void *) {
  MAY_FAIL(cuMemcpyHtoDAsync_v2);
  driver::log("upload %zu", bytes);
  if (!driver::inside(to, bytes)) return driver::ILLEGAL_ADDRESS;
  memcpy((void *)to, from, bytes);
  return 0;
}
CU(cuMemcpyDtoHAsync_v2, void *to, uint64_t from, size_t bytes, void *) {
  MAY_FAIL(cuMemcpyDtoHAsync_v2);
  driver::log("download %zu", bytes);
  if (!driver::inside(from, bytes)) return driver::ILLEGAL_ADDRESS;
  memcpy(to, (const void *)from, bytes);
  return 0;
}
CU(cuMemcpyDtoDAsync_v2, uint64_t to, uint64_t from, size_t bytes, void *) {
  MAY_FAIL(cuMemcpyDtoDAsync_v2);
  if (!driver::inside(to, bytes) || !driver::inside(from, bytes)) return driver::ILLEGAL_ADDRESS;
  memmove((void *)to, (const void *)from, bytes);
  return 0;
}
CU(cuStreamCreate, void **stream, unsigned) { MAY_FAIL(cuStreamCreate); *stream = &driver::stream_kind; return 0; }
CU(cuStreamDestroy_v2, void *) { return 0; }
CU(cuStreamSynchronize, void *) { MAY_FAIL(cuStreamSynchronize); return 0; }
CU(cuLaunchKernel, void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
   unsigned shared, void *, void **arguments, void **) {
  MAY_FAIL(cuLaunchKernel);
  const driver::Kernel *kernel = (const driver::Kernel *)function;
  driver::log("launch %s %u,%u,%u %u,%u,%u %u", kernel->name, gx, gy, gz, bx, by, bz, shared);
  const char *order = getenv("GRAPHOPT_EMULATED_ORDER");
  const uint32_t geometry[] = {gx, gy, gz, bx, by, bz, shared};
  return kernel->run(geometry, arguments, order ? (uint32_t)atoi(order) : 0) ? driver::LAUNCH_FAILED : 0;
}
CU(cuGetErrorName, int code, const char **name) {
  *name = code == driver::OUT_OF_MEMORY   ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == 100                   ? "CUDA_ERROR_NO_DEVICE"
          : code == driver::LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED"
                                          : "CUDA_ERROR_UNKNOWN";
  return 0;
}
CU(cuGetErrorString, int code, const char **text) {
  *text = code == driver::OUT_OF_MEMORY   ? "out of memory"
          : code == 100                   ? "no CUDA-capable device is detected"
          : code == driver::LAUNCH_FAILED ? (simt::message[0] ? simt::message : "unspecified launch failure")
                                          : "unknown error";
  return 0;
}
