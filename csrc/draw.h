// Draws a token of every row of logits, by the inverse of its distribution function.
#pragma once

#include <cstdint>

namespace airl_fast {

// For every row of logits [rows, vocab], `stride` floats apart: the first token whose sum of
// probabilities, softmax(scale logits), passes u [rows] in [0, 1), and its log-probability. A token
// of probability 0 is never drawn. A row that holds NaN or infinity has a log-probability of NaN.
void draw_rows(const float* logits, std::int64_t stride, std::int64_t rows, std::int64_t vocab,
               float scale, const double* u, std::int64_t* tokens, float* logp, int threads);

}  // namespace airl_fast
