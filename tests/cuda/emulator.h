// Runs the sources of csrc/cuda/ on a CPU: one fiber per CUDA thread, deterministic, switched at
// barriers and warp shuffles only. Stands in for CUDA where csrc/cuda/device.h is not compiled by
// nvcc. Shared memory is poisoned and of the exact size; misaligned 16-byte accesses and barriers
// that some threads never reach stop the program.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};

namespace emulator {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s\n", message);
  std::abort();
}

struct Barrier {
  int expected = 0, arrived = 0;
  std::int64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  int parity = 0, reads = 0;
  unsigned char slots[2][32][16];
};

struct Block {
  std::int64_t index;
  int rank;
  std::unique_ptr<unsigned char[]> shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Fiber {  // kept from block to block: it is begun once, and then goes on
  ucontext_t context;
  std::jmp_buf registers;
  std::unique_ptr<char[]> stack;
  bool begun;
  Block* block;
  unsigned thread;
  bool done;
  int turn;                       // of this thread in its warp's shuffles
  std::int64_t cluster_waits_for;  // generation
  void* sanitizer;
};

struct Machine {
  std::function<void()> kernel;
  std::vector<Block> blocks;  // of the cluster that runs
  Barrier cluster;
  std::deque<Fiber> fibers;  // the first of them run
  std::size_t running = 0;
  ucontext_t scheduler;
  std::jmp_buf scheduler_registers;
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  Fiber* current = nullptr;
  unsigned threads = 0;
  std::int64_t grid = 0;
  std::int64_t progress = 0;
};

inline Machine machine;

constexpr std::size_t kStack = 256 * 1024;

// Under the sanitizer, which must know of every switch, by swapcontext; else by setjmp, which asks
// nothing of the system.
inline void to_scheduler() {
  Fiber* me = machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&me->sanitizer, machine.scheduler_stack,
                                 machine.scheduler_stack_size);
  swapcontext(&me->context, &machine.scheduler);
  __sanitizer_finish_switch_fiber(me->sanitizer, nullptr, nullptr);
#else
  if (_setjmp(me->registers) == 0) _longjmp(machine.scheduler_registers, 1);
#endif
}

inline void to_fiber(Fiber* fiber) {
  machine.current = fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_sanitizer, fiber->stack.get(), kStack);
  swapcontext(&machine.scheduler, &fiber->context);
  __sanitizer_finish_switch_fiber(machine.scheduler_sanitizer, nullptr, nullptr);
#else
  if (_setjmp(machine.scheduler_registers) != 0) return;
  if (fiber->begun) _longjmp(fiber->registers, 1);
  fiber->begun = true;
  setcontext(&fiber->context);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                  &machine.scheduler_stack_size);
#endif
  for (;;) {
    machine.kernel();
    machine.current->done = true;
    ++machine.progress;
    to_scheduler();
  }
}

inline std::int64_t arrive(Barrier& barrier) {
  const std::int64_t mine = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  ++machine.progress;
  return mine;
}

inline void wait(const Barrier& barrier, std::int64_t generation) {
  while (barrier.generation == generation) to_scheduler();
}

inline void make_fiber() {
  Fiber& fiber = machine.fibers.emplace_back();
  fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

inline void start_fibers(std::int64_t first_block, int cluster, int threads,
                         std::int64_t shared_bytes) {
  const std::size_t count = static_cast<std::size_t>(cluster) * static_cast<unsigned>(threads);
  machine.blocks = std::vector<Block>(static_cast<std::size_t>(cluster));
  machine.cluster = {static_cast<int>(count), 0, 0};
  machine.running = count;
  while (machine.fibers.size() < count) make_fiber();
  for (int rank = 0; rank < cluster; ++rank) {
    Block& block = machine.blocks[static_cast<std::size_t>(rank)];
    block.index = first_block + rank;
    block.rank = rank;
    block.shared.reset(new unsigned char[static_cast<std::size_t>(shared_bytes)]);
    std::memset(block.shared.get(), 0xff, static_cast<std::size_t>(shared_bytes));
    block.barrier.expected = threads;
    block.warps.resize(static_cast<std::size_t>(threads / 32));
    for (Warp& warp : block.warps) warp.barrier.expected = 32;
  }
  for (std::size_t i = 0; i < count; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.block = &machine.blocks[i / static_cast<unsigned>(threads)];
    fiber.thread = static_cast<unsigned>(i % static_cast<unsigned>(threads));
    fiber.done = false;
    fiber.turn = 0;
  }
}

inline void run_fibers() {
  for (bool running = true; running;) {
    const std::int64_t before = machine.progress;
    running = false;
    for (std::size_t i = 0; i < machine.running; ++i) {
      Fiber& fiber = machine.fibers[i];
      if (fiber.done) continue;
      running = true;
      to_fiber(&fiber);
    }
    if (running && machine.progress == before) fail("a barrier that some threads never reach");
  }
}

template <class T>
T exchange(T value, unsigned from) {
  Fiber* me = machine.current;
  Warp& warp = me->block->warps[me->thread / 32];
  const int parity = me->turn++ & 1;  // two sets of slots: one barrier a shuffle is enough
  std::memcpy(warp.slots[parity][me->thread % 32], &value, sizeof value);
  wait(warp.barrier, arrive(warp.barrier));
  std::memcpy(&value, warp.slots[parity][from % 32], sizeof value);
  return value;
}

}  // namespace emulator

#define threadIdx (Index{emulator::machine.current->thread})
#define blockIdx (Index{static_cast<unsigned>(emulator::machine.current->block->index)})
#define blockDim (Index{emulator::machine.threads})
#define gridDim (Index{static_cast<unsigned>(emulator::machine.grid)})

inline void __syncthreads() {
  auto& barrier = emulator::machine.current->block->barrier;
  emulator::wait(barrier, emulator::arrive(barrier));
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange(value, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, (threadIdx.x % 32) ^ static_cast<unsigned>(mask));
}
// Lanes below the first keep their own value.
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return emulator::exchange(value, lane >= by ? lane - by : lane);
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

namespace airl_fast::gpu {

template <class... Args>
void launch(const char*, void (*kernel)(Args...), const LaunchShape& shape, void*, Args... args) {
  auto& machine = emulator::machine;
  if (shape.threads % 32 != 0 || shape.threads < 32 || shape.threads > 1024 || shape.cluster < 1 ||
      shape.cluster > 8 || shape.blocks % shape.cluster != 0) {
    emulator::fail("a launch that no GPU takes");
  }
  machine.kernel = [=] { kernel(args...); };
  machine.threads = static_cast<unsigned>(shape.threads);
  machine.grid = shape.blocks;
  for (std::int64_t block = 0; block < shape.blocks; block += shape.cluster) {
    emulator::start_fibers(block, shape.cluster, shape.threads, shape.shared_bytes);
    emulator::run_fibers();
  }
}

inline int cluster_rank() { return emulator::machine.current->block->rank; }
inline int cluster_size() { return static_cast<int>(emulator::machine.blocks.size()); }
inline void cluster_arrive() {
  emulator::machine.current->cluster_waits_for = emulator::arrive(emulator::machine.cluster);
}
inline void cluster_wait() {
  emulator::wait(emulator::machine.cluster, emulator::machine.current->cluster_waits_for);
}
inline unsigned char* shared_memory() { return emulator::machine.current->block->shared.get(); }
template <class T>
const T* in_block(const T* shared, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(shared) - shared_memory();
  auto& block = emulator::machine.blocks[static_cast<std::size_t>(rank)];
  return reinterpret_cast<const T*>(block.shared.get() + offset);
}

template <class T>
T load(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T) != 0) emulator::fail("a misaligned access");
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
void store(void* p, T x) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T) != 0) emulator::fail("a misaligned access");
  std::memcpy(p, &x, sizeof x);
}
inline uint4 load16(const void* p) { return load<uint4>(p); }
inline void store16(void* p, uint4 x) { store(p, x); }
inline void store8(void* p, uint2 x) { store(p, x); }
inline int min(int a, int b) { return a < b ? a : b; }

template <class T>
float to_float(T x) {
  return widen(x);
}
template <class T>
void from_float(float x, T* out) {
  narrow(x, out);
}
template <class T>
unsigned pack(float low, float high, T) {
  T first, second;
  narrow(low, &first);
  narrow(high, &second);
  return first.bits | static_cast<unsigned>(second.bits) << 16;
}
inline unsigned float_bits(float x) { return bits_of(x); }
inline float bits_float(unsigned x) { return float_of(x); }

}  // namespace airl_fast::gpu
