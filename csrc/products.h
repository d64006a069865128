// Matrix products in float32 on the tiles of AMX, which multiply bfloat16 alone.
//
// A float32 is the sum of three bfloat16 numbers, exactly but for numbers below 2^-110 and above
// bfloat16's largest, 3.39e38. With x = x1 + x2 + x3, each part 2^-9 of the one before or less,
//
//   x y = x1 y1 + (x1 y2 + x2 y1) + (x1 y3 + x2 y2 + x3 y1) + what is below 2^-26 of it
//
// so that six products, each added in float32, are as exact as one that is computed in float32
// (Henry, Tang, Heinecke 2019, arXiv 1904.06376). Two parts and three products leave 2^-17. An
// operand in bfloat16 is one part. A product that is not finite is infinite or NaN.
//
// A row of the result has the same bits whatever the other rows and columns are, and on any number
// of threads.
#pragma once

#include <cstdint>

#include "rows.h"

namespace airl_fast {

// An operand: element (i, j) lies at data + i * row_stride + j * column_stride, and one of the two
// strides is 1. float32 or bfloat16.
struct Operand {
  const void* data;
  Element element;
  std::int64_t row_stride, column_stride;
};

// A matrix that a is multiplied with, and what becomes of it.
struct Factor {
  Operand b;                 // [K, N]
  std::int64_t n;
  float* out;                // [M, N], contiguous within a row
  std::int64_t out_stride;   // of a row, in elements
  const float* plus;         // [M, N] that is added to the product, or null
  std::int64_t plus_stride;  // of its rows; 0 for a bias [N]
};

// out_i = a B_i + plus_i, all B_i of one element. With `gate`, there are two factors of as many
// columns, and silu(a B_0) * (a B_1) goes to out_0 alone; K is at most kGateInner.
struct Product {
  Operand a;  // [M, K]
  std::int64_t m, k;
  Factor factors[3];
  int count;               // of factors
  bool add;                // to what there is in out
  bool gate;
  const float* norm;       // [K], or null: a's rows x stand for norm * (x / root mean square of x),
  float epsilon;           // the square's mean plus epsilon; a is float32, contiguous within a row
};

constexpr std::int64_t kGateInner = 1536;

// Whether this processor and its system have the tiles.
bool products_ready();

// Computes a product of at most `parts` (1 to 3) parts of an operand.
void multiply(const Product& product, int parts, int threads);

}  // namespace airl_fast
