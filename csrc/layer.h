// What lies between the products of a decoder's layer, in float32, one read and one write each.
//
// Rows are independent, and every element is computed by the same vector code, so that no result
// depends on the other rows or on the number of threads.
#pragma once

#include <cstdint>

namespace airl_fast {

// Matrices [rows, width], contiguous.
struct Extent {
  std::int64_t rows, width;
  std::int64_t count() const { return rows * width; }
};

// out = weight * (x * scale), scale [rows] = 1 / sqrt(mean(x^2) + epsilon) of each row.
void norm_rows(Extent size, const float* x, const float* weight, float epsilon, float* out,
               float* scale, int threads);

// The gradient at x of the above, given that at out: with u = weight * grad and s = scale,
//   s u - x s^3 mean(u x)
void norm_gradient(Extent size, const float* grad, const float* x, const float* weight,
                   const float* scale, float* out, int threads);

// out = gate / (1 + exp(-gate)) * up.
void gate_rows(Extent size, const float* gate, const float* up, float* out, int threads);

// The gradients of the above: with s = 1 / (1 + exp(-gate)),
//   at gate: grad up s (1 + gate (1 - s)),   at up: grad gate s
void gate_gradient(Extent size, const float* grad, const float* gate, const float* up,
                   float* d_gate, float* d_up, int threads);

// Heads [tokens, heads, size] of x, `stride` floats from token to token.
struct Heads {
  const float* x;
  std::int64_t stride, tokens, heads, size;
};

// Rotates pairs, half a head apart, into out [tokens, heads, size], given cos and sin [tokens, size]
// (arXiv 2104.09864):
//   out_i = x_i cos_i - x_j sin_i,   out_j = x_j cos_j + x_i sin_j,   j = i + size / 2
// `back`: its transpose, which takes gradients at out to those at x.
void rotate_heads(const Heads& heads, const float* cos, const float* sin, bool back, float* out,
                  int threads);

}  // namespace airl_fast
