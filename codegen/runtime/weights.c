/* NAME_map_weights and NAME_unmap_weights: the weights file as read-only memory that processes share. */
#define _GNU_SOURCE
#include "runtime.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

size_t GRAPHOPT_SYMBOL(weights_bytes)(void);

/* Nothing can be mapped from an empty file, and NULL means failure. */
static const char no_weights[64] __attribute__((aligned(64)));

GRAPHOPT_PUBLIC const void *GRAPHOPT_SYMBOL(map_weights)(const char *path) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  struct stat status;
  size_t bytes = GRAPHOPT_SYMBOL(weights_bytes)();
  const void *result = 0;
  if (fstat(file, &status) == 0 && S_ISREG(status.st_mode) && (uint64_t)status.st_size == bytes) {
    if (bytes == 0) {
      result = no_weights;
    } else {
      /* Every run reads all of it, so it is read in now, and not page by page in the first run. */
      void *mapped = mmap(0, bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
      result = mapped == MAP_FAILED ? 0 : mapped;
    }
  }
  close(file);
  return result;
}

GRAPHOPT_PUBLIC void GRAPHOPT_SYMBOL(unmap_weights)(const void *weights) {
  if (weights && weights != no_weights) munmap((void *)weights, GRAPHOPT_SYMBOL(weights_bytes)());
}
