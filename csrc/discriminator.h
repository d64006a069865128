// The discriminator's loss over S spans, with its statistics, in one read; and its gradient.
#pragma once

#include <cstdint>

#include "segments.h"

namespace airl_fast {

struct DiscriminatorOptions {
  bool subtract_logp;  // logit f - log pi ("airl"), else f
  bool critic;         // "wgan": mean f of the policy minus mean f of experts; no cross-entropy
  double label_smoothing, temperature;
};

// f, logp and weight [S] (weight.data null for ones), is_expert [S]. Everything in double.
template <typename T>
struct Spans {
  View<T> f, logp, weight;
  const unsigned char* is_expert;  // 0, or anything else for True
  std::int64_t expert_stride, count;
};

// out [11]: the loss, then DiscriminatorStats in the order of airl_fast.DiscriminatorStats.
template <typename T>
void discriminator_loss(const Spans<T>& spans, const DiscriminatorOptions& options, double* out);

// d loss / d f times grad, [S]; d loss / d logp is its negative where the logit has f - log pi.
template <typename T>
void discriminator_gradient(const Spans<T>& spans, const DiscriminatorOptions& options,
                            double grad, double* out);

}  // namespace airl_fast
