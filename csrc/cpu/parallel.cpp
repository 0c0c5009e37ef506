#include "cpu/parallel.h"

#include <atomic>
#include <thread>

#include "erq_cpu.h"

namespace erq {
namespace {

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

std::atomic<Parallel> shared_parallel{nullptr};

struct Job {
  std::atomic<int64_t> next{0};
  int64_t count;
  void (*body)(void *, int64_t);
  void *context;
};

// A thread that the runtime never starts costs nothing: the others take its tasks.
void work(void *argument) {
  Job &job = *static_cast<Job *>(argument);
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;)
    job.body(job.context, i);
}

}  // namespace

void run_tasks(int64_t count, int threads, void (*body)(void *, int64_t), void *context) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(context, i);
    return;
  }
  Job job;
  job.count = count;
  job.body = body;
  job.context = context;
  if (Parallel parallel = shared_parallel.load(std::memory_order_acquire)) {
    parallel(work, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  constexpr int kMost = 64;
  std::thread others[kMost];
  int started = threads - 1 < kMost ? threads - 1 : kMost;
  for (int t = 0; t < started; ++t) others[t] = std::thread(work, &job);
  work(&job);
  for (int t = 0; t < started; ++t) others[t].join();
}

}  // namespace erq

extern "C" void erq_cpu_set_parallel(void *gomp_parallel) {
  erq::shared_parallel.store(reinterpret_cast<erq::Parallel>(gomp_parallel),
                             std::memory_order_release);
}
