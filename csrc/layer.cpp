#include "layer.h"

#include "parallel.h"
#include "rows_kernels.h"

namespace airl_fast {
namespace {

// Calls run(row) for every row, at least 16,384 numbers to a piece of work.
template <class Run>
void each_row(std::int64_t rows, std::int64_t width, int threads, Run run) {
  share(rows, 1 + 16384 / (width + 1), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) run(r);
  });
}

}  // namespace

void norm_rows(Extent size, const float* x, const float* weight, float epsilon, float* out,
               float* scale, int threads) {
  const auto kernel = row_kernels().layer.norm;
  each_row(size.rows, size.width, threads, [&](std::int64_t r) {
    kernel(size.width, x + r * size.width, weight, epsilon, out + r * size.width, scale + r);
  });
}

void norm_gradient(Extent size, const float* grad, const float* x, const float* weight,
                   const float* scale, float* out, int threads) {
  const auto kernel = row_kernels().layer.norm_gradient;
  each_row(size.rows, size.width, threads, [&](std::int64_t r) {
    const std::int64_t at = r * size.width;
    kernel(size.width, grad + at, x + at, weight, scale[r], out + at);
  });
}

void gate_rows(Extent size, const float* gate, const float* up, float* out, int threads) {
  const auto kernel = row_kernels().layer.gate;
  each_row(size.rows, size.width, threads, [&](std::int64_t r) {
    const std::int64_t at = r * size.width;
    kernel(size.width, gate + at, up + at, out + at);
  });
}

void gate_gradient(Extent size, const float* grad, const float* gate, const float* up,
                   float* d_gate, float* d_up, int threads) {
  const auto kernel = row_kernels().layer.gate_gradient;
  each_row(size.rows, size.width, threads, [&](std::int64_t r) {
    const std::int64_t at = r * size.width;
    kernel(size.width, grad + at, gate + at, up + at, d_gate + at, d_up + at);
  });
}

void rotate_heads(const Heads& heads, const float* cos, const float* sin, bool back, float* out,
                  int threads) {
  const auto kernel = row_kernels().layer.rotate;
  const std::int64_t width = heads.heads * heads.size;
  each_row(heads.tokens, width, threads, [&](std::int64_t t) {
    for (std::int64_t h = 0; h < heads.heads; ++h) {
      kernel(heads.size / 2, heads.x + t * heads.stride + h * heads.size, cos + t * heads.size,
             sin + t * heads.size, back, out + t * width + h * heads.size);
    }
  });
}

}  // namespace airl_fast
