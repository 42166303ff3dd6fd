/* The threads of parallel kernels: TVMBackendParallelLaunch and NAME_set_threads.

   Workers start with the first parallel region. Between regions they spin for some ten microseconds, as the next kernel
   mostly follows at once, then sleep. The caller works too, and takes over the tasks of workers that are late. One region
   runs in the pool at a time: a region inside a task, or of another thread's run, is done by its caller alone. So is
   every region in a process made by fork until it has started workers of its own.

   A region is published as one 64-bit ticket: its serial number, its number of tasks, the next task to take. Who takes a
   task by compare-and-swap knows that the region is still that one and cannot end before the task is done, so the fields
   of `job` are his to read. */
#define _GNU_SOURCE
#include "runtime.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

enum { MAX_THREADS = 256, TASK_BITS = 16, TASK_MASK = 0xffff, SPINS = 2000, SPINS_BEFORE_YIELD = 10000 };

static struct {
  graphopt_task task;
  void *data;
  int32_t num_task;
} job;
static _Alignas(64) _Atomic uint64_t ticket;
static _Alignas(64) _Atomic int32_t tasks_done;
static _Atomic int job_result;
/* The process that runs a region in the pool, or starts or stops workers; 0: none. A fork copies a value that nobody in
   the child will clear, so it counts only in the process that it names. */
static _Alignas(64) atomic_int owner;
static _Atomic int32_t threads_wanted;   /* as set by NAME_set_threads */
static _Atomic int32_t sleepers;
static atomic_int stopping;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
/* Written by the owner only. */
static pthread_t workers[MAX_THREADS];
static int32_t workers_started;
static int32_t workers_tried;            /* as many as were asked for; fewer start where the system refuses */
static pid_t workers_process;

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb"); /* waits longer than yield, which most cores skip */
#endif
}

static int own(void) {
  int process = getpid(), now = 0;
  return atomic_compare_exchange_strong(&owner, &now, process) ||
         (now != process && atomic_compare_exchange_strong(&owner, &now, process));
}

static void disown(void) { atomic_store(&owner, 0); }

static int task_is_waiting(void) {
  uint64_t now = atomic_load(&ticket);
  return (now & TASK_MASK) < (now >> TASK_BITS & TASK_MASK);
}

static int take_task(void) {
  uint64_t now = atomic_load(&ticket);
  while ((now & TASK_MASK) < (now >> TASK_BITS & TASK_MASK))
    if (atomic_compare_exchange_weak(&ticket, &now, now + 1)) return (int)(now & TASK_MASK);
  return -1;
}

static void do_tasks(void) {
  for (int number; (number = take_task()) >= 0;) {
    graphopt_task_env env = {0, job.num_task};
    int result = job.task(number, &env, job.data);
    if (result) atomic_store(&job_result, result);
    atomic_fetch_add(&tasks_done, 1);
  }
}

static void *work(void *unused) {
  for (;;) {
    for (int spin = 0; spin < SPINS && !task_is_waiting(); spin++) relax();
    if (!task_is_waiting()) {
      pthread_mutex_lock(&sleep_lock);
      atomic_fetch_add(&sleepers, 1);
      while (!task_is_waiting() && !atomic_load(&stopping)) pthread_cond_wait(&wake, &sleep_lock);
      atomic_fetch_sub(&sleepers, 1);
      pthread_mutex_unlock(&sleep_lock);
    }
    if (atomic_load(&stopping)) return unused;
    do_tasks();
  }
}

static void wake_sleepers(void) {
  pthread_mutex_lock(&sleep_lock);
  pthread_cond_broadcast(&wake);
  pthread_mutex_unlock(&sleep_lock);
}

static void stop_workers(void) {
  if (!workers_started || workers_process != getpid()) return;
  atomic_store(&stopping, 1);
  wake_sleepers();
  for (int32_t i = 0; i < workers_started; i++) pthread_join(workers[i], 0);
  atomic_store(&stopping, 0);
  workers_started = workers_tried = 0;
}

static void start_workers(int32_t count) {
  if (workers_process != getpid()) { /* the first region, or the first after a fork, which copies no threads */
    workers_process = getpid();
    workers_started = workers_tried = 0;
    atomic_store(&ticket, 0); /* the region of another thread may have been in flight */
    atomic_store(&sleepers, 0);
    atomic_store(&stopping, 0);
    pthread_mutex_init(&sleep_lock, 0);
    pthread_cond_init(&wake, 0);
  }
  if (workers_tried >= count) return;
  sigset_t all, before; /* signals are for the program's own threads */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (workers_started < count && pthread_create(&workers[workers_started], 0, work, 0) == 0) workers_started++;
  workers_tried = count;
  pthread_sigmask(SIG_SETMASK, &before, 0);
}

static int32_t processors(void) {
  static _Atomic int32_t known;
  int32_t count = atomic_load(&known);
  if (count) return count;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) count = CPU_COUNT(&allowed);
  if (count < 1) count = (int32_t)sysconf(_SC_NPROCESSORS_ONLN);
  count = count < 1 ? 1 : count > MAX_THREADS ? MAX_THREADS : count;
  atomic_store(&known, count);
  return count;
}

static int run_alone(graphopt_task task, void *data) {
  graphopt_task_env env = {0, 1};
  return task(0, &env, data);
}

/* TVM splits the loop by the number of tasks that it finds in the environment, so any number is right. */
int TVMBackendParallelLaunch(graphopt_task task, void *data, int num_task) {
  int32_t threads = atomic_load(&threads_wanted);
  if (threads == 0) threads = processors();
  if (num_task > 0 && num_task < threads) threads = num_task;
  if (threads == 1 || !own()) return run_alone(task, data);
  start_workers(threads - 1);
  if (workers_started == 0) {
    disown();
    return run_alone(task, data);
  }
  job.task = task;
  job.data = data;
  job.num_task = threads;
  atomic_store(&job_result, 0);
  atomic_store(&tasks_done, 0);
  uint64_t serial = (atomic_load(&ticket) >> 2 * TASK_BITS) + 1;
  atomic_store(&ticket, serial << 2 * TASK_BITS | (uint64_t)threads << TASK_BITS);
  if (atomic_load(&sleepers)) wake_sleepers();
  do_tasks();
  for (int spin = 0; atomic_load(&tasks_done) < threads; spin++) {
    if (spin < SPINS_BEFORE_YIELD)
      relax();
    else
      sched_yield();
  }
  int result = atomic_load(&job_result);
  disown();
  return result;
}

GRAPHOPT_PUBLIC void GRAPHOPT_SYMBOL(set_threads)(int32_t threads) {
  while (!own()) sched_yield();
  stop_workers(); /* the next region starts as many as it needs */
  atomic_store(&threads_wanted, threads < 0 ? 0 : threads > MAX_THREADS ? MAX_THREADS : threads);
  disown();
}

/* No thread may be left in this code when dlclose unmaps it. */
__attribute__((destructor)) static void at_unload(void) {
  if (!own()) return; /* the program ends in the midst of a run */
  stop_workers();
}
