/* A program that runs a model a number of times on one thread: main WEIGHTS RUNS. Its inputs are zeros: what is
   executed does not depend on them. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

static const size_t input_bytes[] = {INPUT_BYTES 0}, output_bytes[] = {OUTPUT_BYTES 0};
enum { INPUTS = sizeof input_bytes / sizeof(size_t) - 1, OUTPUTS = sizeof output_bytes / sizeof(size_t) - 1 };

static void *zeros(size_t bytes) {
  void *pointer = 0;
  if (posix_memalign(&pointer, 64, bytes ? bytes : 1)) exit(1);
  return memset(pointer, 0, bytes);
}

int main(int count, char **arguments) {
  const void *inputs[INPUTS + 1], *weights = count == 3 ? GRAPHOPT_SYMBOL(map_weights)(arguments[1]) : 0;
  void *outputs[OUTPUTS + 1], *workspace = zeros(GRAPHOPT_SYMBOL(workspace_bytes)());
  if (!weights) return 1;
  GRAPHOPT_SYMBOL(set_threads)(1);
  for (int i = 0; i < INPUTS; i++) inputs[i] = zeros(input_bytes[i]);
  for (int i = 0; i < OUTPUTS; i++) outputs[i] = zeros(output_bytes[i]);
  for (int i = atoi(arguments[2]); i > 0; i--)
    if (GRAPHOPT_SYMBOL(run)(weights, inputs, outputs, workspace)) return 2;
  return 0;
}
