/* What the runtime's files share. GRAPHOPT_SYMBOL(run) is NAME_run, with the model's name: it prefixes every function
   that a program sees, and everything else is hidden, so that any number of models can be linked into one program. The
   command line defines it, with the name inside: as an operand of ## it stays what it is, though a header has a macro
   of that name. */
#ifndef GRAPHOPT_RUNTIME_H
#define GRAPHOPT_RUNTIME_H
#include <stddef.h>
#include <stdint.h>

#ifndef GRAPHOPT_SYMBOL
#error "compile with -DGRAPHOPT_SYMBOL(function)=NAME_##function"
#endif

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
