#include "rows.h"

#include <atomic>
#include <stdexcept>

#include "instruction_set.h"
#include "parallel.h"
#include "rows_kernels.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace airl_fast {
namespace {

struct Path {
  const char* name;
  const RowKernels* kernels;
};

#if AIRL_FAST_X86 && defined(__GNUC__)
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
bool has_avx2() {
  // Every processor with AVX2 has F16C, whose name older compilers do not know here.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
bool has_avx512() { return false; }
bool has_avx2() { return false; }
#endif

std::vector<Path> available() {
  std::vector<Path> paths;
#if AIRL_FAST_X86
  if (has_avx512()) paths.push_back({"avx512", &avx512_kernels()});
  if (has_avx2()) paths.push_back({"avx2", &avx2_kernels()});
#endif
  paths.push_back({"portable", &portable_kernels()});
  return paths;
}

const std::vector<Path>& paths() {
  static const std::vector<Path> found = available();
  return found;
}

std::atomic<std::size_t> chosen{0};  // an index of paths()

// Rows to a piece of work: at least 32,768 logits, some ten microseconds.
std::int64_t rows_per_piece(const Chunk& chunk) { return 1 + 32768 / chunk.vocab; }

}  // namespace

const RowKernels& row_kernels() { return *paths()[chosen].kernels; }

void read_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets,
               std::int64_t first, int threads, RowStats* stats, float* logp, float* entropy) {
  const auto kernel = row_kernels().read[static_cast<int>(chunk.element)];
  share(chunk.rows, rows_per_piece(chunk), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      kernel(chunk, head, r, targets[r] - first, first == 0, stats + r, logp + r,
             entropy == nullptr ? nullptr : entropy + r);
    }
  });
}

void differentiate_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets,
                        std::int64_t first, int threads, const RowStats* stats,
                        const float* d_logp, const float* d_entropy, void* gradient) {
  const auto kernel = row_kernels().differentiate[static_cast<int>(chunk.element)];
  share(chunk.rows, rows_per_piece(chunk), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      kernel(chunk, head, r, targets[r] - first, stats[r], d_logp == nullptr ? 0.0 : d_logp[r],
             d_entropy == nullptr ? 0.0 : d_entropy[r], gradient);
    }
  });
}

void weigh_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets,
                std::int64_t first, int threads, RowStats* stats, float* logp, float* entropy,
                float* tangent, float* sums, std::int64_t width) {
  const auto kernel = row_kernels().weigh;
  share(chunk.rows, rows_per_piece(chunk), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      kernel(chunk, head, r, targets[r] - first, first == 0, stats + r, logp + r, entropy + r,
             tangent + r, sums + r * width, width);
    }
  });
}

std::vector<std::string> vector_paths() {
  std::vector<std::string> names;
  for (const Path& path : paths()) names.emplace_back(path.name);
  return names;
}

std::string vector_path() { return paths()[chosen].name; }

bool uses_avx2() { return &row_kernels() != &portable_kernels(); }

void use_vector_path(const std::string& name) {
  for (std::size_t i = 0; i < paths().size(); ++i) {
    if (name == paths()[i].name) {
      chosen = i;
      return;
    }
  }
  throw std::invalid_argument("vector path '" + name +
                              "' is not available: expected one of _C.vector_paths()");
}

void advise_huge_pages(void* data, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHuge = std::uintptr_t{1} << 21;
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace airl_fast
