// Runs every kernel of csrc/ over odd shapes in buffers of exactly the right size, for the
// sanitizers to watch; test_cpu_rows.py compiles it.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "discriminator.h"
#include "half.h"
#include "rows.h"
#include "segments.h"

namespace {

template <class T>
bool rows(std::int64_t rows, std::int64_t vocab, std::int64_t gap, airl_fast::Element element,
          bool biased, bool capped, int threads, std::int64_t past = 0) {
  const std::int64_t stride = vocab + gap;
  std::vector<T> logits(static_cast<std::size_t>(rows > 0 ? (rows - 1) * stride + vocab : 0));
  for (std::size_t i = 0; i < logits.size(); ++i) {
    airl_fast::narrow(static_cast<float>(i % 37) - 18.0f, &logits[i]);
  }
  const std::vector<float> bias(static_cast<std::size_t>(vocab), 0.5f);
  const auto count = static_cast<std::size_t>(rows);
  std::vector<std::int64_t> targets(count, vocab - 1 + past);
  std::vector<airl_fast::RowStats> stats(count);
  std::vector<float> logp(count), entropy(count), upstream(count, 0.5f);
  const airl_fast::Chunk chunk{logits.data(), stride, rows, vocab, element};
  const airl_fast::Head head{biased ? bias.data() : nullptr, 0.7f, capped ? 9.0f : 0.0f, 0.7f};
  for (float* wanted : {static_cast<float*>(nullptr), entropy.data()}) {
    airl_fast::read_rows(chunk, head, targets.data(), 0, threads, stats.data(), logp.data(),
                         wanted);
  }
  std::vector<T> elsewhere(logits.size());
  for (std::vector<T>* gradient : {&elsewhere, &logits}) {
    airl_fast::differentiate_rows(chunk, head, targets.data(), 0, threads, stats.data(),
                                  upstream.data(), upstream.data(), gradient->data());
  }
  bool sound = true;
  if (element == airl_fast::Element::kFloat32) {  // gradients are logits, too; in two parts
    const std::int64_t width = 3, half = vocab / 2;
    std::vector<float> tangent(count), sums(count * width, 1.0f);
    for (std::int64_t first = 0; first < vocab; first += half > 0 && first == 0 ? half : vocab) {
      const std::int64_t columns = first == 0 && half > 0 ? half : vocab - first;
      const airl_fast::Chunk part{elsewhere.data() + first, stride, rows, columns, element};
      const airl_fast::Head tile{biased ? bias.data() + first : nullptr, 0.7f,
                                 capped ? 9.0f : 0.0f, 0.7f};
      airl_fast::weigh_rows(part, tile, targets.data(), first, threads, stats.data(), logp.data(),
                            entropy.data(), tangent.data(), sums.data(), width);
    }
    for (const float sum : sums) sound &= std::isfinite(sum);
  }
  if (past != 0) return true;  // such a target is no column: any numbers, and nothing out of bounds
  for (std::size_t r = 0; r < count; ++r) sound &= logp[r] <= 0.0f && entropy[r] >= 0.0f;
  for (const T& gradient : logits) sound &= std::isfinite(airl_fast::widen(gradient));
  return sound;
}

template <class T>
bool every_shape(airl_fast::Element element) {
  bool sound = true;
  for (std::int64_t vocab : {1, 2, 7, 8, 15, 16, 17, 31, 33, 1031, 2047, 2048, 2049, 4099}) {
    for (std::int64_t count : {0, 1, 3}) {
      for (int options = 0; options < 4; ++options) {
        sound &= rows<T>(count, vocab, vocab % 3, element, options & 1, options & 2, 1 + options);
      }
    }
  }
  for (std::int64_t past : {std::int64_t{1}, std::int64_t{-2048}, std::int64_t{1} << 62}) {
    rows<T>(3, 1031, 0, element, true, true, 1, past);
  }
  return sound && rows<T>(70, 1031, 5, element, true, true, 3);
}

template <class T>
void segments(std::int64_t stride, int threads, std::vector<std::int32_t> cu) {
  const std::int64_t total = cu.back();
  const airl_fast::Offsets at{cu.data(), static_cast<std::int64_t>(cu.size()) - 1};
  const auto values = static_cast<std::size_t>(total), spans = static_cast<std::size_t>(at.spans);
  const std::size_t size = total == 0 ? 0 : (values - 1) * static_cast<std::size_t>(stride) + 1;
  const std::vector<T> x(size, T{0.5});
  const std::vector<float> g(size, 0.5f), p(values, 0.25f);
  std::vector<float> by_value(values), by_span(spans);
  const airl_fast::View<T> view{x.data(), stride};
  const airl_fast::View<float> gradient{g.data(), stride};
  airl_fast::partitions(at, total);
  for (bool flag : {false, true}) {
    airl_fast::segment_sum(view, at, flag, threads, by_span.data());
    airl_fast::discounted_scan(view, at, 0.9, flag, threads, by_value.data());
    airl_fast::segment_spread({by_span.data(), 1}, at, flag, threads, by_value.data());
  }
  airl_fast::segment_last(view, at, threads, by_span.data());
  airl_fast::segment_softmax(view, at, threads, by_value.data());
  airl_fast::segment_softmax_gradient(p.data(), gradient, at, threads, by_value.data());
}

template <class T>
void every_partition() {
  std::vector<std::int32_t> many{0};
  for (std::int32_t s = 0; many.back() < 70000; ++s) many.push_back(many.back() + 1 + s % 37);
  for (std::int64_t stride : {0, 1, 3}) {
    for (int threads : {1, 3}) {
      segments<T>(stride, threads, {0});
      segments<T>(stride, threads, {0, 1, 14, 15, 31, 48, 52, 60, 60 + 131});
      segments<T>(stride, threads, many);
    }
  }
}

template <class T>
bool discriminator() {
  const std::vector<T> f{T{-900}, T{0}, T{3}, T{900}}, logp{T{-1}, T{-2}, T{-3}, T{-4}};
  const unsigned char is_expert[] = {1, 0, 2, 0};
  double results[11], gradient[4];
  bool sound = true;
  for (int options = 0; options < 8; ++options) {
    for (std::int64_t count : {0, 1, 4}) {
      const airl_fast::Spans<T> spans{{f.data(), 1},  {logp.data(), 1},
                                      {options & 1 ? logp.data() : nullptr, 0},
                                      is_expert,      1,
                                      count};
      const airl_fast::DiscriminatorOptions form{(options & 2) != 0, (options & 4) != 0, 0.1, 2.0};
      airl_fast::discriminator_loss(spans, form, results);
      airl_fast::discriminator_gradient(spans, form, 1.0, gradient);
      sound &= std::isfinite(results[0]);
    }
  }
  return sound;
}

}  // namespace

int main() {
  bool sound = true;
  for (const auto& path : airl_fast::vector_paths()) {
    airl_fast::use_vector_path(path);
    sound &= every_shape<float>(airl_fast::Element::kFloat32);
    sound &= every_shape<airl_fast::BFloat16>(airl_fast::Element::kBFloat16);
    sound &= every_shape<airl_fast::Float16>(airl_fast::Element::kFloat16);
    every_partition<float>();
    every_partition<double>();
  }
  sound &= discriminator<float>() && discriminator<double>();
  std::puts(sound ? "sound" : "a result is out of bounds");
  return sound ? 0 : 1;
}
