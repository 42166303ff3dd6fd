/* What the runtime's files share. GRAPHOPT_NAME is the model's name: it prefixes every function that a program sees, and
   everything else is hidden, so that any number of models can be linked into one program. */
#ifndef GRAPHOPT_RUNTIME_H
#define GRAPHOPT_RUNTIME_H
#include <stddef.h>
#include <stdint.h>

#define GRAPHOPT_PASTE_(a, b) a##_##b
#define GRAPHOPT_PASTE(a, b) GRAPHOPT_PASTE_(a, b)
#define GRAPHOPT_SYMBOL(function) GRAPHOPT_PASTE(GRAPHOPT_NAME, function)

#ifdef __wasm__
#define GRAPHOPT_PUBLIC
#else
#define GRAPHOPT_PUBLIC __attribute__((visibility("default")))
#endif

/* TVM's environment of one task of a parallel region. */
typedef struct {
  void *sync_handle;
  int32_t num_task;
} graphopt_task_env;

typedef int (*graphopt_task)(int task, void *env, void *data);
#endif
