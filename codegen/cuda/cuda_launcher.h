/* What a compiled model hands to the launcher: its kernels' images, and its launches as data. */
#ifndef GRAPHOPT_CUDA_LAUNCHER_H
#define GRAPHOPT_CUDA_LAUNCHER_H
#include <stddef.h>
#include <stdint.h>

#define GRAPHOPT_HIDDEN __attribute__((visibility("hidden")))

enum { SPACE_INPUT, SPACE_OUTPUT, SPACE_WEIGHT, SPACE_ARENA };

typedef struct {
  uint32_t space, index; /* index: which input or output */
  uint64_t offset;       /* bytes */
} Place;

typedef struct {
  uint32_t kernel; /* index of its name */
  uint32_t grid[3], block[3], dynamic_shared_bytes;
  uint32_t first, count; /* its arguments, in the table of places */
} Launch;

typedef struct {
  uint32_t output;
  Place source;
} Copy;

typedef struct {
  const char *name, *arch; /* sm_80 */
  int32_t major, minor;    /* compute capability that the cubin is for, and the least for the PTX */
  const void *cubin;
  const char *ptx;
  const char *const *kernels;
  const uint32_t *kernel_shared_bytes; /* most dynamic shared memory of any launch */
  const Place *places;
  const Launch *launches;
  const Copy *copies;
  const uint64_t *input_bytes, *output_bytes;
  uint64_t weights_bytes, arena_bytes;
  uint32_t kernel_count, launch_count, copy_count, input_count, output_count;
} Model;

typedef struct Context Context;

GRAPHOPT_HIDDEN Context *graphopt_cuda_load(const Model *model, const void *weights, int32_t device);
GRAPHOPT_HIDDEN void graphopt_cuda_unload(Context *context);
GRAPHOPT_HIDDEN int32_t graphopt_cuda_run(Context *context, const void *const *inputs, void *const *outputs);
GRAPHOPT_HIDDEN int32_t graphopt_cuda_run_device(Context *context, const void *const *inputs, void *const *outputs,
                                                 void *stream);
GRAPHOPT_HIDDEN const char *graphopt_cuda_error(void);

#endif
