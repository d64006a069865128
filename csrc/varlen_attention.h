// Attention within the segments of a packed batch, in float32: each query sees the keys of the
// segment that its own continues, and those of its own up to itself.
//
// What a query takes depends on its own segment and on the one that this continues, alone; it has
// the same bits where the latter's tokens are laid before its own instead. Gradients at keys are
// added up first in each segment, then over segments in their order, so that no result depends on
// the number of threads. That takes memory for the gradients at all keys that each segment sees.
#pragma once

#include <cstdint>

namespace airl_fast {

// T tokens of queries, U of keys (the same ones, but for a text that is continued alone).
struct VarlenSizes {
  std::int64_t heads, key_heads;  // heads: a multiple of key_heads
  std::int64_t size, value_size;  // numbers of a query's and key's head, and of a value's
  std::int64_t window;            // a token sees itself and the window - 1 before it
  float scale;                    // of the scores
};

// Heads [tokens, heads, size] with strides in floats; the numbers of a head lie together.
struct PackedHeads {
  const float* x;
  std::int64_t token, head;
};

// Queries, the keys that all of them see, and as many keys of their own.
struct VarlenSegment {
  std::int64_t first_query, queries, first_shared, shared, first_own;
};

struct VarlenInputs {
  const VarlenSegment* segments;
  std::int64_t count;
  PackedHeads queries, keys, values;  // [T, heads, size], [U, key_heads, size], [U, .., value_size]
};

// out [T, heads, value_size] = softmax(scale q K^T) V. statistics [T, heads, 2], or null, takes the
// largest scaled score and the sum of exp(score - largest).
void attend_segments(const VarlenSizes& sizes, const VarlenInputs& inputs, float* out,
                     float* statistics, int threads);

struct VarlenGradients {
  float *queries, *keys, *values;  // contiguous, of the shapes of the inputs
  std::int64_t tokens;             // U
};

// The gradients of the above, given those at out; out and statistics are what it left.
void differentiate_segments(const VarlenSizes& sizes, const VarlenInputs& inputs, const float* out,
                            const float* statistics, PackedHeads d_out,
                            const VarlenGradients& gradients, int threads);

}  // namespace airl_fast
