// Attention of rows that go on a token at a time, in float32: of prompts that several rows share,
// and of what each row holds beyond its own.
//
// A result depends on its row and head alone, not on the other rows or on the number of threads.
#pragma once

#include <cstdint>

namespace airl_fast {

struct RowSizes {
  std::int64_t rows, heads, key_heads, size;  // heads: a multiple of key_heads
  std::int64_t tokens;                        // of all prompts
  std::int64_t room, own;  // tokens that a row has room for, and has, the new one included
  std::int64_t window;     // a token sees itself and the window - 1 before it
};

struct RowKeys {
  const float* prompt_keys;    // [key_heads, size, tokens]
  const float* prompt_values;  // [key_heads, tokens, size]
  const std::int64_t* starts;  // [rows], the row's prompt among the tokens
  const std::int64_t* counts;  // [rows], its tokens
  float* own_keys;             // [rows, key_heads, size, room]
  float* own_values;           // [rows, key_heads, room, size]
};

// Puts keys and values [rows, key_heads, size] of new tokens after those of their rows, and writes
// what each query [rows, heads, size] takes from all that its row holds into out [rows, heads, size]:
// softmax(scale q K^T) V.
void attend_rows(const RowSizes& sizes, const RowKeys& held, const float* queries,
                 const float* keys, const float* values, float scale, float* out, int threads);

}  // namespace airl_fast
