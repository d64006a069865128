#include "draw.h"

#include <vector>

#include "parallel.h"
#include "rows_kernels.h"

namespace airl_fast {

void draw_rows(const float* logits, std::int64_t stride, std::int64_t rows, std::int64_t vocab,
               float scale, const double* u, std::int64_t* tokens, float* logp, int threads) {
  const auto kernel = row_kernels().draw;
  share(rows, 1 + 16384 / vocab, threads, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> sums(static_cast<std::size_t>((vocab + kDrawBlock - 1) / kDrawBlock));
    for (std::int64_t r = begin; r < end; ++r) {
      tokens[r] = kernel(logits + r * stride, vocab, scale, u[r], sums.data(), logp + r);
    }
  });
}

}  // namespace airl_fast
