// Kernels over the rows of a chunk of logits a [R, V] in GPU memory, in place. z, log p and the
// formulas are those of ../rows.h; statistics are float32.
//
//   read           one read of the chunk: logp, entropy and the statistics
//   differentiate  one read and one write: the chunk becomes its gradient
//   policy         both in one kernel, with the policy-gradient loss between them
//
// policy reads a row from memory once: it waits in the shared memory of the blocks that share it
// (from compute capability 9 on up to 8 of them, a cluster); what does not fit is read again.
//
// A target outside [0, V) reads nothing out of bounds: logp and the row's gradient are NaN.
//
// `gradient` is the element of the gradient: that of the logits, or a half-precision one of
// float32 logits. A row of it begins where the row of logits does, so element k of a narrower one
// lies where logit k / 2 did; rows then have to start on multiples of 16 bytes.
#pragma once

#include <cstdint>

#include "../rows.h"
#include "launch.h"

namespace airl_fast::gpu {

// [R]: m = max z, s = sum of exp(z - m), at least 1, sum of exp(z - m) (m - z), z of the target.
struct alignas(16) RowStats {
  float largest, sum, gap, target;
};

// The loss of an action, as in airl_fast/ops/_policy_terms.py, of importance "token".
struct PolicyOptions {
  float clip_low, clip_high;
  float delta;  // infinity for none
  float beta, entropy_coef;
};

// [R] each; old_logp and ref_logp may be null. share: the action's weight in the whole loss.
struct PolicyRows {
  const float *advantages, *old_logp, *ref_logp, *share;
};

// How a row is shared out. Results do not depend on it, but for the order of float32 sums.
struct Plan {
  int cluster, threads;
  std::int64_t kept_bytes;  // of a row, in the shared memory of each block
};

Plan plan_read(const Chunk& chunk, const Device& device);
Plan plan_policy(const Chunk& chunk, const Device& device);

// stats, logp and entropy are [R] or null.
void read_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets,
               const Plan& plan, RowStats* stats, float* logp, float* entropy, void* stream);

// d_logp and d_entropy are [R] or null for zero.
void differentiate_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets,
                        const RowStats* stats, const float* d_logp, const float* d_entropy,
                        Element gradient, void* stream);

// Also writes logp and entropy [R].
void policy_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets,
                 const Plan& plan, const PolicyRows& actions, const PolicyOptions& options,
                 float* logp, float* entropy, Element gradient, void* stream);

}  // namespace airl_fast::gpu
