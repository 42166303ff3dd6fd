/* A program around a model, for emulators:

     main WEIGHTS THREADS SECONDS TIMES INPUTS... OUTPUTS...

   reads the input files, runs for SECONDS (0: once), writes the output files and, as doubles, the seconds of each run
   into TIMES. The bytes of each input and output are compiled in, and those of the workspace and the weights, which must
   be the model's own. Ends with 0, with 1 where a file is at fault, with 2 where a kernel failed, with 3 where the sizes
   differ; standard error says which. */
#define _GNU_SOURCE
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

size_t GRAPHOPT_SYMBOL(workspace_bytes)(void);
size_t GRAPHOPT_SYMBOL(weights_bytes)(void);
int32_t GRAPHOPT_SYMBOL(run)(const void *, const void *const *, void *const *, void *);
void GRAPHOPT_SYMBOL(set_threads)(int32_t);
const void *GRAPHOPT_SYMBOL(map_weights)(const char *);

/* Each list ends with a 0 of its own, as a model may have no inputs and C no empty arrays. */
static const size_t input_bytes[] = {GRAPHOPT_INPUT_BYTES 0};
static const size_t output_bytes[] = {GRAPHOPT_OUTPUT_BYTES 0};
enum { INPUTS = sizeof input_bytes / sizeof(size_t) - 1, OUTPUTS = sizeof output_bytes / sizeof(size_t) - 1 };

static void *memory(size_t bytes) {
  void *pointer;
  if (posix_memalign(&pointer, 64, bytes ? bytes : 1) == 0) return pointer;
  fprintf(stderr, "no %zu bytes of memory\n", bytes);
  exit(1);
}

static void transfer(const char *path, void *data, size_t bytes, int writing) {
  FILE *file = fopen(path, writing ? "wb" : "rb");
  size_t done = file == 0 ? 0 : writing ? fwrite(data, 1, bytes, file) : fread(data, 1, bytes, file);
  if (file && fclose(file) == 0 && done == bytes) return;
  fprintf(stderr, "%s: cannot %s %zu bytes\n", path, writing ? "write" : "read", bytes);
  exit(1);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

int main(int count, char **arguments) {
  if (count != 5 + INPUTS + OUTPUTS) {
    fprintf(stderr, "%d arguments, not %d\n", count - 1, 4 + INPUTS + OUTPUTS);
    return 1;
  }
  size_t workspace_bytes = GRAPHOPT_SYMBOL(workspace_bytes)(), weights_bytes = GRAPHOPT_SYMBOL(weights_bytes)();
  if (workspace_bytes != GRAPHOPT_WORKSPACE_BYTES || weights_bytes != GRAPHOPT_WEIGHTS_BYTES) {
    fprintf(stderr, "%zu %zu\n", workspace_bytes, weights_bytes);
    return 3;
  }
  const void *weights = GRAPHOPT_SYMBOL(map_weights)(arguments[1]);
  if (!weights) {
    fprintf(stderr, "%s: missing, or of another size\n", arguments[1]);
    return 1;
  }
  GRAPHOPT_SYMBOL(set_threads)(atoi(arguments[2]));
  const void *inputs[INPUTS + 1];
  void *outputs[OUTPUTS + 1], *workspace = memory(workspace_bytes);
  for (int i = 0; i < INPUTS; i++) {
    void *data = memory(input_bytes[i]);
    transfer(arguments[5 + i], data, input_bytes[i], 0);
    inputs[i] = data;
  }
  for (int i = 0; i < OUTPUTS; i++) outputs[i] = memory(output_bytes[i]);
  double end = now() + atof(arguments[3]);
  FILE *times = fopen(arguments[4], "wb");
  do {
    double start = now();
    int32_t status = GRAPHOPT_SYMBOL(run)(weights, inputs, outputs, workspace);
    double taken = now() - start;
    if (status) {
      fprintf(stderr, "kernel %d failed\n", -status);
      return 2;
    }
    if (!times || fwrite(&taken, sizeof taken, 1, times) != 1) {
      fprintf(stderr, "%s: cannot write\n", arguments[4]);
      return 1;
    }
  } while (now() < end);
  if (fclose(times)) return 1;
  for (int i = 0; i < OUTPUTS; i++) transfer(arguments[5 + INPUTS + i], outputs[i], output_bytes[i], 1);
  return 0;
}
