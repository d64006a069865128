// Shares rows among threads of its own: torch's OpenMP threads are another runtime's, and idle here.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace airl_fast {

// Calls run(begin, end) for consecutive pieces of [0, count). Whoever is free takes the next one:
// a thread whose core is still held by a spinning OpenMP thread does less, and delays nobody.
template <class Run>
void share(std::int64_t count, std::int64_t piece, int threads, Run run) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (;;) {
      const std::int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= count) return;
      run(begin, std::min(begin + piece, count));
    }
  };
  const std::int64_t pieces = (count + piece - 1) / piece;
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads && i < pieces; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads: those that run share the work
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace airl_fast
