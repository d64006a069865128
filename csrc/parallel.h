// Shares rows among the threads that torch's own operators run on, where they can be found.
//
// Between two products those threads wait for work by spinning. A thread of our own would have to
// take a core from one of them, and the call would wait until the scheduler lets it finish.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace airl_fast {

// GCC's entry to a parallel region, which LLVM's and Intel's runtimes have, too: calls fn(data) on
// `threads` threads, and returns when all have.
using Team = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

// That of the OpenMP runtime which torch has loaded; null if there is none to be found.
Team torch_team();

// Calls run(begin, end) for consecutive pieces of [0, count). Whoever is free takes the next one.
template <class Run>
void share(std::int64_t count, std::int64_t piece, int threads, Run run) {
  std::atomic<std::int64_t> next{0};
  auto work = [&] {
    for (;;) {
      const std::int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= count) return;
      run(begin, std::min(begin + piece, count));
    }
  };
  const std::int64_t pieces = (count + piece - 1) / piece;
  if (threads <= 1 || pieces <= 1) return work();
  if (const Team team = torch_team()) {
    team([](void* all) { (*static_cast<decltype(work)*>(all))(); }, &work,
         static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads && i < pieces; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads: those that run share the work
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace airl_fast
