"""The thread pool in C, under all that may be done to it at once."""

from __future__ import annotations

import subprocess

import pytest

from graphopt.targets import resolve
from graphopt.targets.cpu import host_machine
from graphopt.targets.toolchain import runtime_folder, symbols_of
from graphopt.targets.zig import zig

_STRESS = """
#include "runtime.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int TVMBackendParallelLaunch(graphopt_task, void *, int);
void m_set_threads(int32_t);

typedef struct { long *hits; int n, nest, fail; } region;

/* Splits the loop as TVM's kernels do. */
static int task(int id, void *env, void *data) {
  region *r = data;
  int step = (r->n + ((graphopt_task_env *)env)->num_task - 1) / ((graphopt_task_env *)env)->num_task;
  for (int i = id * step; i < r->n && i < (id + 1) * step; i++) {
    r->hits[i]++;
    if (i == r->fail) return -4;
    if (r->nest && i % 50 == 0) {
      long hits[10] = {0};
      region inner = {hits, 10, 0, -1};
      if (TVMBackendParallelLaunch(task, &inner, 0)) return -2;
      for (int k = 0; k < 10; k++) if (hits[k] != 1) return -3;
    }
  }
  return 0;
}

static void *user(void *number) {
  for (int round = 0; round < 2000; round++) {
    long hits[200];
    memset(hits, 0, sizeof hits);
    region r = {hits, 200, (int)(long)number & 1, round % 100 == 0 ? 199 : -1};
    int status = TVMBackendParallelLaunch(task, &r, round % 7 - 1);
    if (status != (r.fail < 0 ? 0 : -4)) printf("status %d\\n", status), exit(1);
    for (int i = 0; i < 200; i++) if (hits[i] != 1) printf("item %d done %ld times\\n", i, hits[i]), exit(1);
    if (round % 500 == 499) m_set_threads(2 + (int)(long)number + round % 3);
  }
  return 0;
}

int main(int count, char **arguments) {
  long users = atoi(arguments[count - 1]);
  pthread_t threads[8];
  m_set_threads(4);
  for (long i = 0; i < users; i++) pthread_create(&threads[i], 0, user, (void *)i);
  for (long i = 0; i < users; i++) pthread_join(threads[i], 0);
  return 0;
}
"""


@pytest.mark.skipif(not host_machine(), reason="the runtime is for Linux")
def test_every_item_is_done_once(tmp_path):
    """By one user and by several; nested regions, failing tasks, fewer tasks than threads, changing thread counts."""
    target = resolve("cpu")
    for file in ("threads.c", "runtime.h"):
        (tmp_path / file).write_bytes((runtime_folder() / file).read_bytes())
    (tmp_path / "stress.c").write_text(_STRESS)
    machine = ["-target", target.zig, f"-mcpu={target.zig_cpu}"]
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", symbols_of("m"), "-lpthread"]
    command = ["cc", *machine, *options, "threads.c", "stress.c", "-o", "stress"]
    zig(command, tmp_path, name="stress", target=target.spec)
    for users in (1, 3):
        done = subprocess.run([tmp_path / "stress", str(users)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout


def test_no_source_warns(tmp_path):
    """The runtime is compiled into every model: it has to be clean under -Wall -Wextra, on each kind of target."""
    for spec, files in (("cpu", ("weights.c", "kernel_support.c")), ("wasm", ("kernel_support.c",))):
        target = resolve(spec)
        for file in (*files, "runtime.h"):
            (tmp_path / file).write_bytes((runtime_folder() / file).read_bytes())
        options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", symbols_of("m"), "-c"]
        for file in files:
            command = ["cc", "-target", target.zig, f"-mcpu={target.zig_cpu}", *options, file, "-o", "out.o"]
            zig(command, tmp_path, name="runtime", target=spec)
