// Reductions, scans and losses over spans of flat float32 vectors in GPU memory: x [N], and int32
// offsets cu [S + 1] that cut it, strictly increasing from 0 to N. Sums are kept in float64.
//
// Offsets are checked by the Python side. Whatever they hold, nothing outside of x is read and
// nothing outside of out written: they are clamped to [0, N].
#pragma once

#include <cstdint>

#include "../rows.h"
#include "launch.h"

namespace airl_fast::gpu {

struct Vector {
  const float* data;
  std::int64_t stride;  // in elements
};

struct Cuts {
  const std::int32_t* offsets;  // [count + 1]
  std::int64_t count, total;    // S and N
};

// out [S].
void segment_sum(const Vector& x, const Cuts& cu, bool mean, float* out, void* stream);
void segment_last(const Vector& x, const Cuts& cu, float* out, void* stream);

// out [N], which sums to 1 over each span.
void segment_softmax(const Vector& x, const Cuts& cu, float* out, void* stream);

// out [N]: y_i = x_i + gamma y_{i+1} within each span, or gamma y_{i-1} forwards.
void discounted_scan(const Vector& x, const Cuts& cu, double gamma, bool forwards, float* out,
                     void* stream);

// f = w0 . x + b0 at a span's last action; with two rows, g and h, it is
// g + gamma h(after) - h(before), h being 0 before a sequence's first span and after its last.
struct ScoreHead {
  Chunk hidden;         // [N, F], as a chunk of logits is
  const float* weight;  // [rows, F], contiguous
  const float* bias;    // [rows] or null
  int rows;             // 1 or 2
  float gamma;          // of two rows
};

// f [S], and reward [S]: f less the sum or mean of logp [N] over the span; f where logp is null.
// sequences cuts the spans: B and S. Not read with one row.
void score_spans(const ScoreHead& head, const Cuts& cu, const Cuts& sequences, const float* logp,
                 bool mean, float* f, float* reward, void* stream);

struct DiscriminatorOptions {
  bool subtract_logp;  // logit f - log pi ("airl"), else f
  bool critic;         // "wgan": mean f of the policy minus mean f of experts; no cross-entropy
  double label_smoothing, temperature;
};

// f, logp and weight [S] (weight.data null for ones), is_expert [S] of one byte.
struct Spans {
  Vector f, logp, weight;
  const unsigned char* is_expert;
  std::int64_t expert_stride, count;
};

// Numbers of float64 that the two below need at `scratch`.
std::int64_t discriminator_scratch(std::int64_t spans);

// out [11] float64: the loss, then DiscriminatorStats in the order of airl_fast.DiscriminatorStats.
void discriminator_loss(const Spans& spans, const DiscriminatorOptions& options, double* scratch,
                        double* out, void* stream);

// d loss / d f times *grad (in GPU memory), [S] float64; d loss / d logp is its negative where the
// logit has f - log pi.
void discriminator_gradient(const Spans& spans, const DiscriminatorOptions& options,
                            const double* grad, double* scratch, double* out, void* stream);

}  // namespace airl_fast::gpu
