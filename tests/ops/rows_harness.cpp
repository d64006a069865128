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
          bool biased, bool capped, int threads) {
  const std::int64_t stride = vocab + gap;
  std::vector<T> logits(static_cast<std::size_t>(rows > 0 ? (rows - 1) * stride + vocab : 0));
  for (std::size_t i = 0; i < logits.size(); ++i) {
    airl_fast::narrow(static_cast<float>(i % 37) - 18.0f, &logits[i]);
  }
  const std::vector<float> bias(static_cast<std::size_t>(vocab), 0.5f);
  const auto count = static_cast<std::size_t>(rows);
  std::vector<std::int64_t> targets(count, vocab - 1);
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
  return sound && rows<T>(70, 1031, 5, element, true, true, 3);
}

template <class T>
void segments() {
  const std::vector<T> x(15, T{0.5});
  const std::vector<std::int32_t> cu{0, 1, 1 + 13, 15}, none{0};
  std::vector<float> out(15);
  for (std::int64_t stride : {0, 1}) {
    const airl_fast::View<T> view{x.data(), stride};
    for (bool flag : {false, true}) {
      airl_fast::segment_sum(view, cu.data(), 3, flag, out.data());
      airl_fast::discounted_scan(view, cu.data(), 3, 0.9, flag, out.data());
    }
    airl_fast::segment_last(view, cu.data(), 3, out.data());
    airl_fast::segment_softmax(view, cu.data(), 3, out.data());
    airl_fast::segment_sum(view, none.data(), 0, false, out.data());
  }
}

template <class T>
bool discriminator() {
  const std::vector<T> f{T{-900}, T{0}, T{3}, T{900}}, logp{T{-1}, T{-2}, T{-3}, T{-4}};
  const bool is_expert[] = {true, false, true, false};
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
  }
  segments<float>();
  segments<double>();
  sound &= discriminator<float>() && discriminator<double>();
  std::puts(sound ? "sound" : "a result is out of bounds");
  return sound ? 0 : 1;
}
