// Kernels over the rows of a chunk of logits a [R, V]: one read for log-sum-exp, target and entropy;
// one read and write that turns the logits into their gradient, in place or elsewhere.
//
//   z = cap * tanh(scale * (a + bias) / cap) / t      without a cap: scale * (a + bias) / t
//   log p = log_softmax(z)
//
// Rows are independent, so no result depends on the number of threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace airl_fast {

enum class Element : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Chunk {
  void* logits;              // [R, V], contiguous within a row
  std::int64_t row_stride;   // in elements
  std::int64_t rows, vocab;  // R >= 0, V >= 1
  Element element;
};

struct Head {
  const float* bias;   // [V] or null; of the chunk's columns
  float inner;         // scale / cap; without a cap scale / t
  float outer;         // cap / t; 0 stands for no cap
  float slope;         // scale / t: dz / da where tanh is 0
};

// What reading a row leaves behind. Sums are kept in double: 150,000 terms lose nothing.
struct RowStats {
  double largest;  // m = max z
  double sum;      // s = sum of exp(z - m), at least 1
  double gap;      // sum of exp(z - m) (m - z); only with entropy
  double target;   // z of the target
};

// logp [R], entropy [R] or null: log p = (z_target - m) - log s, H = log s + gap / s. Both keep
// their signs exactly, and stay precise for logits of 1e4, where m + log s would lose 1e-3.
// A chunk may hold the columns from `first` on: where that is above 0, stats are carried on from
// the columns before, and logp and entropy are right once the last column has been read.
void read_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets,
               std::int64_t first, int threads, RowStats* stats, float* logp, float* entropy);

// Turns a into slope dz/da ( d_logp (1[k = target] - p_k) - d_entropy p_k (log p_k + H) ).
// d_logp and d_entropy are [R] or null for zero; with d_entropy the stats need their gap, and in
// any case they are those of all columns, whichever of them the chunk holds, from `first` on.
// The gradient is laid out like the chunk: it may be chunk.logits itself, or must not overlap it.
void differentiate_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets,
                        std::int64_t first, int threads, const RowStats* stats,
                        const float* d_logp, const float* d_entropy, void* gradient);

// For gradients at the hidden states alone, which need no second look at the logits. Reads columns
// as read_rows does, and turns a (float32) into weights exp(z - m) tanh'(..), m the largest z so
// far, 0 at the target; and where m has grown multiplies sums [R, width] by exp(m before - m). So
// when each part's weights times its rows of the head have been added to sums, these are
//   sum over k != target of exp(z_k - m) tanh'_k W_k
// and the gradient is slope d_logp (tangent (1 - p_target) W_target - sums / s). tangent [R] is
// tanh' at the target, 1 without a cap.
void weigh_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets,
                std::int64_t first, int threads, RowStats* stats, float* logp, float* entropy,
                float* tangent, float* sums, std::int64_t width);

// Vector instructions: "avx512", "avx2" and "portable", the first that the processor has is used.
std::vector<std::string> vector_paths();
std::string vector_path();
void use_vector_path(const std::string& name);  // throws std::invalid_argument; for tests
bool uses_avx2();  // which every processor with AVX-512 has

// Asks for huge pages under [data, data + bytes): a page fault per 4 KiB of a fresh 128 MiB buffer
// costs as much as the row kernel. Does nothing where the system has no such call.
void advise_huge_pages(void* data, std::int64_t bytes);

}  // namespace airl_fast
