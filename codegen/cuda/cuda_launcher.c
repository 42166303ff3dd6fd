/* Loads a model's kernels and launches them through the driver, which is opened when a model is loaded: the library
   itself links to nothing of NVIDIA's, and loads on machines without a GPU. */
#include "cuda_launcher.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The part of the driver's interface that is used; the names and numbers are those of cuda.h. */
typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, MAX_DYNAMIC_SHARED_SIZE = 8 };
enum { JIT_ERROR_LOG = 5, JIT_ERROR_LOG_BYTES = 6, STREAM_NON_BLOCKING = 1 };
enum { STATIC_LIMIT = 48 << 10, ALIGNMENT = 64, MAX_ARGUMENTS = 64 };

#define DRIVER(X)                                                                                                  \
  X(cuInit, (unsigned))                                                                                            \
  X(cuDeviceGetCount, (int *))                                                                                     \
  X(cuDeviceGet, (CUdevice *, int))                                                                                \
  X(cuDeviceGetAttribute, (int *, int, CUdevice))                                                                  \
  X(cuDevicePrimaryCtxRetain, (CUcontext *, CUdevice))                                                             \
  X(cuDevicePrimaryCtxRelease_v2, (CUdevice))                                                                      \
  X(cuCtxPushCurrent_v2, (CUcontext))                                                                              \
  X(cuCtxPopCurrent_v2, (CUcontext *))                                                                             \
  X(cuModuleLoadDataEx, (CUmodule *, const void *, unsigned, int *, void **))                                      \
  X(cuModuleUnload, (CUmodule))                                                                                    \
  X(cuModuleGetFunction, (CUfunction *, CUmodule, const char *))                                                   \
  X(cuFuncSetAttribute, (CUfunction, int, int))                                                                    \
  X(cuMemAlloc_v2, (CUdeviceptr *, size_t))                                                                        \
  X(cuMemFree_v2, (CUdeviceptr))                                                                                   \
  X(cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void *, size_t, CUstream))                                           \
  X(cuMemcpyDtoHAsync_v2, (void *, CUdeviceptr, size_t, CUstream))                                                 \
  X(cuMemcpyDtoDAsync_v2, (CUdeviceptr, CUdeviceptr, size_t, CUstream))                                            \
  X(cuStreamCreate, (CUstream *, unsigned))                                                                        \
  X(cuStreamDestroy_v2, (CUstream))                                                                                \
  X(cuStreamSynchronize, (CUstream))                                                                               \
  X(cuLaunchKernel, (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,   \
                     void **, void **))                                                                            \
  X(cuGetErrorName, (CUresult, const char **))                                                                     \
  X(cuGetErrorString, (CUresult, const char **))

typedef struct {
  void *handle;
#define FIELD(name, parameters) CUresult(*name) parameters;
  DRIVER(FIELD)
#undef FIELD
} Driver;

struct Context {
  const Model *model;
  Driver cu;
  CUdevice device;
  CUcontext context; /* the device's primary one, which the CUDA runtime and PyTorch use as well */
  CUmodule module;
  CUfunction *functions;
  CUstream stream;
  CUdeviceptr weights, arena;
  CUdeviceptr *staged; /* for inputs and outputs on the host; allocated by the first run that needs them */
};

static _Thread_local char message[1024];

const char *graphopt_cuda_error(void) { return message; }

__attribute__((format(printf, 1, 2))) static void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
}

/* Keeps the driver's words for a code, with what was being done. */
static CUresult explain(const Context *c, CUresult code, const char *what) {
  const char *name = NULL, *text = NULL;
  c->cu.cuGetErrorName(code, &name);
  c->cu.cuGetErrorString(code, &text);
  fail("%s: %s failed: %s (%s, %d)", c->model->name, what, text ? text : "unknown error", name ? name : "?", code);
  return code;
}

#define TRY(call, what)                                        \
  do {                                                         \
    CUresult code_ = c->cu.call;                               \
    if (code_ != 0) return explain(c, code_, what);            \
  } while (0)

static void leave(const Context *c) {
  CUcontext popped;
  c->cu.cuCtxPopCurrent_v2(&popped);
}

static int open_driver(Context *c) {
  c->cu.handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!c->cu.handle) {
    fail("%s: no CUDA driver: %s", c->model->name, dlerror());
    return 1;
  }
#define FIND(function, parameters)                                                                        \
  *(void **)&c->cu.function = dlsym(c->cu.handle, #function);                                              \
  if (!c->cu.function) {                                                                                   \
    fail("%s: the CUDA driver is too old: libcuda.so.1 has no %s", c->model->name, #function);             \
    return 1;                                                                                              \
  }
  DRIVER(FIND)
#undef FIND
  return 0;
}

/* The cubin where the device can run it (same major number, no lower minor number), else the PTX. */
static CUresult load_module(Context *c) {
  const Model *m = c->model;
  int major = 0, minor = 0;
  TRY(cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, c->device), "asking for the device's compute capability");
  TRY(cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, c->device), "asking for the device's compute capability");
  if (major < m->major || (major == m->major && minor < m->minor)) {
    fail("%s: was compiled for %s and newer, and the device is sm_%d%d", m->name, m->arch, major, minor);
    return 1;
  }
  if (major == m->major && c->cu.cuModuleLoadDataEx(&c->module, m->cubin, 0, NULL, NULL) == 0) return 0;
  char log[512] = "";
  int options[] = {JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES};
  void *values[] = {log, (void *)sizeof log};
  CUresult code = c->cu.cuModuleLoadDataEx(&c->module, m->ptx, 2, options, values);
  if (code != 0) {
    explain(c, code, "compiling the PTX");
    size_t used = strlen(message);
    snprintf(message + used, sizeof message - used, "%s%s", log[0] ? ": " : "", log);
  }
  return code;
}

static CUresult prepare(Context *c, const void *weights) {
  const Model *m = c->model;
  CUresult code = load_module(c);
  if (code != 0) return code;
  for (uint32_t i = 0; i < m->kernel_count; i++) {
    TRY(cuModuleGetFunction(&c->functions[i], c->module, m->kernels[i]), "finding a kernel");
    if (m->kernel_shared_bytes[i] > STATIC_LIMIT)
      TRY(cuFuncSetAttribute(c->functions[i], MAX_DYNAMIC_SHARED_SIZE, (int)m->kernel_shared_bytes[i]),
          "asking for shared memory");
  }
  TRY(cuStreamCreate(&c->stream, STREAM_NON_BLOCKING), "making a stream");
  if (m->weights_bytes) {
    TRY(cuMemAlloc_v2(&c->weights, m->weights_bytes), "allocating the weights");
    TRY(cuMemcpyHtoDAsync_v2(c->weights, weights, m->weights_bytes, c->stream), "uploading the weights");
  }
  if (m->arena_bytes) TRY(cuMemAlloc_v2(&c->arena, m->arena_bytes), "allocating the arena");
  TRY(cuStreamSynchronize(c->stream), "uploading the weights");
  return 0;
}

Context *graphopt_cuda_load(const Model *model, const void *weights, int32_t device) {
  Context *c = calloc(1, sizeof *c);
  if (!c || !(c->functions = calloc(model->kernel_count + 1, sizeof *c->functions)) ||
      !(c->staged = calloc(model->input_count + model->output_count + 1, sizeof *c->staged))) {
    fail("%s: out of host memory", model->name);
    if (c) free(c->functions), free(c);
    return NULL;
  }
  c->model = model;
  message[0] = 0;
  int count = 0;
  CUresult code;
  if (open_driver(c)) {
  } else if ((code = c->cu.cuInit(0)) || (code = c->cu.cuDeviceGetCount(&count))) {
    explain(c, code, "starting the CUDA driver");
  } else if (device < 0 || device >= count) {
    fail("%s: there is no CUDA device %d; the driver sees %d", model->name, (int)device, count);
  } else if ((code = c->cu.cuDeviceGet(&c->device, device)) ||
             (code = c->cu.cuDevicePrimaryCtxRetain(&c->context, c->device))) {
    explain(c, code, "opening the device");
  } else if ((code = c->cu.cuCtxPushCurrent_v2(c->context))) {
    explain(c, code, "opening the device");
  } else {
    code = prepare(c, weights);
    leave(c);
    if (code == 0) return c;
  }
  graphopt_cuda_unload(c);
  return NULL;
}

void graphopt_cuda_unload(Context *c) {
  if (!c) return;
  if (c->context) {
    if (c->cu.cuCtxPushCurrent_v2(c->context) == 0) {
      if (c->stream) c->cu.cuStreamSynchronize(c->stream), c->cu.cuStreamDestroy_v2(c->stream);
      for (uint32_t i = 0; i < c->model->input_count + c->model->output_count; i++)
        if (c->staged[i]) c->cu.cuMemFree_v2(c->staged[i]);
      if (c->arena) c->cu.cuMemFree_v2(c->arena);
      if (c->weights) c->cu.cuMemFree_v2(c->weights);
      if (c->module) c->cu.cuModuleUnload(c->module);
      leave(c);
    }
    c->cu.cuDevicePrimaryCtxRelease_v2(c->device);
  }
  if (c->cu.handle) dlclose(c->cu.handle);
  free(c->staged);
  free(c->functions);
  free(c);
}

static CUdeviceptr address(const Context *c, Place place, const CUdeviceptr *inputs, const CUdeviceptr *outputs) {
  switch (place.space) {
    case SPACE_INPUT: return inputs[place.index] + place.offset;
    case SPACE_OUTPUT: return outputs[place.index] + place.offset;
    case SPACE_WEIGHT: return c->weights + place.offset;
    default: return c->arena + place.offset;
  }
}

static int32_t enqueue(Context *c, const CUdeviceptr *inputs, const CUdeviceptr *outputs, CUstream stream) {
  const Model *m = c->model;
  for (uint32_t n = 0; n < m->launch_count; n++) {
    const Launch *launch = &m->launches[n];
    CUdeviceptr values[MAX_ARGUMENTS];
    void *pointers[MAX_ARGUMENTS];
    for (uint32_t i = 0; i < launch->count; i++) {
      values[i] = address(c, m->places[launch->first + i], inputs, outputs);
      pointers[i] = &values[i];
    }
    const uint32_t *g = launch->grid, *b = launch->block;
    CUresult code = c->cu.cuLaunchKernel(c->functions[launch->kernel], g[0], g[1], g[2], b[0], b[1], b[2],
                                         launch->dynamic_shared_bytes, stream, pointers, NULL);
    if (code != 0) {
      explain(c, code, m->kernels[launch->kernel]);
      return -(int32_t)(n + 1);
    }
  }
  for (uint32_t i = 0; i < m->copy_count; i++) {
    const Copy *copy = &m->copies[i];
    TRY(cuMemcpyDtoDAsync_v2(outputs[copy->output], address(c, copy->source, inputs, outputs),
                             m->output_bytes[copy->output], stream),
        "copying an output");
  }
  return 0;
}

int32_t graphopt_cuda_run_device(Context *c, const void *const *inputs, void *const *outputs, void *stream) {
  const Model *m = c->model;
  message[0] = 0;
  for (uint32_t i = 0; i < m->input_count + m->output_count; i++) {
    const void *pointer = i < m->input_count ? inputs[i] : outputs[i - m->input_count];
    if ((uintptr_t)pointer % ALIGNMENT == 0) continue;
    fail("%s: %s %u is not aligned to %d bytes", m->name, i < m->input_count ? "input" : "output",
         i < m->input_count ? i : i - m->input_count, ALIGNMENT);
    return 1;
  }
  TRY(cuCtxPushCurrent_v2(c->context), "entering the device's context");
  int32_t code = enqueue(c, (const CUdeviceptr *)inputs, (const CUdeviceptr *)outputs, stream);
  leave(c);
  return code;
}

static int32_t run_staged(Context *c, const void *const *inputs, void *const *outputs) {
  const Model *m = c->model;
  CUdeviceptr *in = c->staged, *out = c->staged + m->input_count;
  for (uint32_t i = 0; i < m->input_count; i++) {
    if (!in[i]) TRY(cuMemAlloc_v2(&in[i], m->input_bytes[i]), "allocating an input");
    TRY(cuMemcpyHtoDAsync_v2(in[i], inputs[i], m->input_bytes[i], c->stream), "copying an input");
  }
  for (uint32_t i = 0; i < m->output_count; i++)
    if (!out[i]) TRY(cuMemAlloc_v2(&out[i], m->output_bytes[i]), "allocating an output");
  int32_t code = enqueue(c, in, out, c->stream);
  if (code != 0) return code;
  for (uint32_t i = 0; i < m->output_count; i++)
    TRY(cuMemcpyDtoHAsync_v2(outputs[i], out[i], m->output_bytes[i], c->stream), "copying an output");
  TRY(cuStreamSynchronize(c->stream), "running the kernels");
  return 0;
}

int32_t graphopt_cuda_run(Context *c, const void *const *inputs, void *const *outputs) {
  message[0] = 0;
  TRY(cuCtxPushCurrent_v2(c->context), "entering the device's context");
  int32_t code = run_staged(c, inputs, outputs);
  /* After an error the copies that were started may still read the caller's memory. */
  if (code != 0) c->cu.cuStreamSynchronize(c->stream);
  leave(c);
  return code;
}
