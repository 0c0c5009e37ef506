// Splits a call into tasks that threads take one by one.
#pragma once

#include <cstdint>

namespace erq {

// Runs body(context, i) for every i in 0..count-1 on up to `threads` threads, the caller included;
// returns when all are done. Tasks are taken in order, each by the next thread that is free.
void run_tasks(int64_t count, int threads, void (*body)(void *context, int64_t i), void *context);

template <typename F>
void parallel_for(int64_t count, int threads, const F &f) {
  run_tasks(
      count, threads, [](void *c, int64_t i) { (*static_cast<const F *>(c))(i); },
      const_cast<F *>(&f));
}

}  // namespace erq
