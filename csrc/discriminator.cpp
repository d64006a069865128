#include "discriminator.h"

#include <cmath>

namespace airl_fast {
namespace {

template <typename T>
double logit_expert_is_high(const Spans<T>& spans, const DiscriminatorOptions& options,
                            std::int64_t i) {
  const double f = spans.f[i];
  return (options.subtract_logp ? f - spans.logp[i] : f) / options.temperature;
}

template <typename T>
double weight_of(const Spans<T>& spans, std::int64_t i) {
  return spans.weight.data == nullptr ? 1.0 : spans.weight[i];
}

double smoothed_target(bool expert, const DiscriminatorOptions& options) {
  return (expert ? 1.0 - options.label_smoothing : 0.0) + options.label_smoothing / 2;
}

// Sums over the spans of one class.
struct Class {
  double count = 0, weight = 0, right = 0, d = 0, f = 0, logit = 0, entropy = 0, loss = 0;
};

double over(double sum, double total) { return total > 0 ? sum / total : 0.0; }

template <typename T>
void total_weights(const Spans<T>& spans, double totals[2]) {
  totals[0] = totals[1] = 0.0;
  for (std::int64_t i = 0; i < spans.count; ++i) {
    totals[spans.is_expert[i * spans.expert_stride] != 0] += weight_of(spans, i);
  }
}

}  // namespace

template <typename T>
void discriminator_loss(const Spans<T>& spans, const DiscriminatorOptions& options, double* out) {
  Class classes[2];  // policy, expert
  for (std::int64_t i = 0; i < spans.count; ++i) {
    const bool expert = spans.is_expert[i * spans.expert_stride] != 0;
    const double x = logit_expert_is_high(spans, options, i), w = weight_of(spans, i);
    // exp of a number of at most 0 cannot overflow: softplus(x) = max(x, 0) + log(1 + e).
    const double e = std::exp(-std::fabs(x)), softplus = std::fmax(x, 0.0) + std::log1p(e);
    const double d = (x >= 0 ? 1.0 : e) / (1.0 + e), y = smoothed_target(expert, options);
    Class& mine = classes[expert];
    mine.count += 1;
    mine.weight += w;
    mine.right += (x > 0) == expert;
    mine.d += d;
    mine.f += spans.f[i];
    mine.logit += x;
    mine.entropy += softplus - x * d;
    // -y log D - (1 - y) log(1 - D), with log D = x - softplus(x); "wgan": f itself.
    mine.loss += w * (options.critic ? x : y * (softplus - x) + (1 - y) * softplus);
  }
  const Class &policy = classes[0], &expert = classes[1];
  const double count = policy.count + expert.count;
  out[0] = options.critic
               ? over(policy.loss, policy.weight) - over(expert.loss, expert.weight)
               : over(policy.loss + expert.loss, policy.weight + expert.weight);
  out[1] = (policy.right + expert.right) / count;  // 0 / 0, the mean of nothing, is NaN
  out[2] = expert.right / expert.count;
  out[3] = policy.right / policy.count;
  out[4] = expert.d / expert.count;
  out[5] = policy.d / policy.count;
  out[6] = (policy.entropy + expert.entropy) / count;
  out[7] = expert.f / expert.count;
  out[8] = policy.f / policy.count;
  out[9] = expert.logit / expert.count;
  out[10] = policy.logit / policy.count;
}

template <typename T>
void discriminator_gradient(const Spans<T>& spans, const DiscriminatorOptions& options,
                            double grad, double* out) {
  double totals[2];
  total_weights(spans, totals);
  for (std::int64_t i = 0; i < spans.count; ++i) {
    const bool expert = spans.is_expert[i * spans.expert_stride] != 0;
    const double w = grad * weight_of(spans, i);
    if (options.critic) {
      out[i] = over(expert ? -w : w, totals[expert]);
      continue;
    }
    const double x = logit_expert_is_high(spans, options, i), e = std::exp(-std::fabs(x));
    const double d = (x >= 0 ? 1.0 : e) / (1.0 + e);
    const double slope = (d - smoothed_target(expert, options)) / options.temperature;
    out[i] = over(w, totals[0] + totals[1]) * slope;
  }
}

#define AIRL_FAST_INSTANTIATE(T)                                                                \
  template void discriminator_loss<T>(const Spans<T>&, const DiscriminatorOptions&, double*);   \
  template void discriminator_gradient<T>(const Spans<T>&, const DiscriminatorOptions&, double, \
                                          double*);
AIRL_FAST_INSTANTIATE(float)
AIRL_FAST_INSTANTIATE(double)
#undef AIRL_FAST_INSTANTIATE

}  // namespace airl_fast
