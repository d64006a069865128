// Runs every kernel of csrc/ over odd shapes in buffers of exactly the right size, for the
// sanitizers to watch; test_cpu_rows.py compiles it.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "discriminator.h"
#include "draw.h"
#include "half.h"
#include "layer.h"
#include "products.h"
#include "row_attention.h"
#include "rows.h"
#include "segments.h"
#include "varlen_attention.h"

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

bool layers(std::int64_t rows, std::int64_t width, int threads) {
  const auto count = static_cast<std::size_t>(rows * width);
  const std::vector<float> x(count, 0.5f), weight(static_cast<std::size_t>(width), 2.0f);
  std::vector<float> a(count), b(count), scale(static_cast<std::size_t>(rows));
  const airl_fast::Extent size{rows, width};
  airl_fast::norm_rows(size, x.data(), weight.data(), 1e-5f, a.data(), scale.data(), threads);
  airl_fast::norm_gradient(size, x.data(), x.data(), weight.data(), scale.data(), b.data(),
                           threads);
  bool sound = true;
  for (const float value : a) sound &= std::fabs(value - 2.0f) < 1e-3f;  // of a constant row
  for (const float value : b) sound &= std::fabs(value) < 1e-3f;         // which it leaves alone
  airl_fast::gate_rows(size, x.data(), x.data(), a.data(), threads);
  airl_fast::gate_gradient(size, x.data(), x.data(), x.data(), a.data(), b.data(), threads);
  if (width % 2 == 0) {
    for (const bool back : {false, true}) {
      airl_fast::rotate_heads({x.data(), width, rows, 1, width}, x.data(), x.data(), back,
                              a.data(), threads);
    }
  }
  return sound;
}

bool draws(std::int64_t rows, std::int64_t vocab, int threads) {
  std::vector<float> logits(static_cast<std::size_t>(rows * vocab));
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 37) - 18.0f;
  const auto count = static_cast<std::size_t>(rows);
  std::vector<double> u(count);
  for (std::size_t r = 0; r < count; ++r) u[r] = static_cast<double>(r) / static_cast<double>(rows);
  std::vector<float> logp(count);
  std::vector<std::int64_t> tokens(count, -1);
  airl_fast::draw_rows(logits.data(), vocab, rows, vocab, 0.7f, u.data(), tokens.data(),
                       logp.data(), threads);
  bool sound = true;
  for (std::size_t r = 0; r < count; ++r) {
    sound &= tokens[r] >= 0 && tokens[r] < vocab && logp[r] <= 0.0f;
  }
  return sound;
}

// Prompts of 1 and `prompt` tokens; rows go on from the second, the first and the second.
bool attention(std::int64_t prompt, std::int64_t size, std::int64_t window, int threads) {
  const std::int64_t rows = 3, key_heads = 2, heads = 4, room = 9, tokens = prompt + 1;
  const auto numbers = [](std::int64_t n) {
    return std::vector<float>(static_cast<std::size_t>(n), 0.25f);
  };
  const auto keys = numbers(key_heads * tokens * size), values = keys;
  const auto query = numbers(rows * heads * size), added = numbers(rows * key_heads * size);
  const std::vector<std::int64_t> starts{1, 0, 1}, counts{prompt, 1, prompt};
  auto own_keys = numbers(rows * key_heads * size * room), own_values = own_keys;
  auto out = numbers(rows * heads * size);
  bool sound = true;
  for (std::int64_t own = 1; own <= room; ++own) {
    airl_fast::attend_rows({rows, heads, key_heads, size, tokens, room, own, window},
                           {keys.data(), values.data(), starts.data(), counts.data(),
                            own_keys.data(), own_values.data()},
                           query.data(), added.data(), added.data(), 0.5f, out.data(), threads);
    for (const float value : out) sound &= std::fabs(value - 0.25f) < 1e-5f;
  }
  return sound;
}

// A segment of `shared` tokens, and two that continue it.
bool packed(std::int64_t shared, std::int64_t size, std::int64_t value_size, std::int64_t window,
            int threads) {
  const std::int64_t heads = 4, key_heads = 2, own = 13, tokens = shared + 2 * own;
  const auto numbers = [](std::int64_t n) {
    return std::vector<float>(static_cast<std::size_t>(n), 0.25f);
  };
  const std::vector<airl_fast::VarlenSegment> segments{
      {0, shared, 0, 0, 0}, {shared, own, 0, shared, shared}, {shared + own, own, 0, shared,
                                                              shared + own}};
  const auto q = numbers(tokens * heads * size), k = numbers(tokens * key_heads * size);
  const auto v = numbers(tokens * key_heads * value_size);
  auto out = numbers(tokens * heads * value_size), statistics = numbers(2 * tokens * heads);
  const auto upstream = out;
  auto d_q = q, d_k = k, d_v = v;
  const airl_fast::VarlenSizes sizes{heads, key_heads, size, value_size, window, 0.5f};
  const airl_fast::VarlenInputs inputs{segments.data(),
                                       static_cast<std::int64_t>(segments.size()),
                                       {q.data(), heads * size, size},
                                       {k.data(), key_heads * size, size},
                                       {v.data(), key_heads * value_size, value_size}};
  airl_fast::attend_segments(sizes, inputs, out.data(), nullptr, threads);
  airl_fast::attend_segments(sizes, inputs, out.data(), statistics.data(), threads);
  airl_fast::differentiate_segments(sizes, inputs, out.data(), statistics.data(),
                                    {upstream.data(), heads * value_size, value_size},
                                    {d_q.data(), d_k.data(), d_v.data(), tokens}, threads);
  bool sound = true;
  for (const float value : out) sound &= std::fabs(value - 0.25f) < 1e-5f;
  for (const float value : d_q) sound &= std::fabs(value) < 1e-5f;
  float all = 0.0f;
  for (const float value : d_v) all += value;  // each query's gradient goes to what it sees
  return sound && std::fabs(all / static_cast<float>(tokens * heads * value_size) - 0.25f) < 1e-4f;
}

#if defined(__linux__)
// Numbers that end where memory ends: the sanitizers do not see what the tiles read and write.
class Guarded {
 public:
  explicit Guarded(std::int64_t count, float value = 0.0f)
      : bytes_((static_cast<std::size_t>(count) * sizeof(float) + kPage - 1) / kPage * kPage) {
    memory_ = static_cast<char*>(mmap(nullptr, bytes_ + kPage, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_ + bytes_, kPage, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<float*>(memory_ + bytes_) - count;
    for (std::int64_t i = 0; i < count; ++i) data_[i] = value;
  }
  ~Guarded() { munmap(memory_, bytes_ + kPage); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  float* data() const { return data_; }

 private:
  static constexpr std::size_t kPage = 4096;
  std::size_t bytes_;
  char* memory_;
  float* data_;
};

bool products(std::int64_t m, std::int64_t k, std::int64_t n, int layout, int threads) {
  const Guarded a(m * k, 0.5f), b(k * n, 2.0f), c(m * n), plus(m * n, 1.0f), norm(k, 1.0f);
  const auto element = airl_fast::Element::kFloat32;
  airl_fast::Product p{};
  p.a = layout & 1 ? airl_fast::Operand{a.data(), element, 1, m}
                   : airl_fast::Operand{a.data(), element, k, 1};
  const auto right = layout & 2 ? airl_fast::Operand{b.data(), element, 1, k}
                                : airl_fast::Operand{b.data(), element, n, 1};
  p.m = m, p.k = k, p.count = 1;
  p.factors[0] = {right, n, c.data(), n, nullptr, 0};
  bool sound = true;
  const auto holds = [&](float value) {
    for (std::int64_t i = 0; i < m * n; ++i) sound &= c.data()[i] == value;
  };
  for (int parts = 1; parts <= 3; ++parts) {
    airl_fast::multiply(p, parts, threads);
    holds(static_cast<float>(k));
  }
  p.add = true;
  p.factors[0].plus = plus.data(), p.factors[0].plus_stride = n;
  airl_fast::multiply(p, 3, threads);
  holds(static_cast<float>(2 * k + 1));
  if ((layout & 1) == 0 && k <= airl_fast::kGateInner) {
    p.add = false, p.gate = true, p.count = 2, p.norm = norm.data();
    p.factors[0].plus = nullptr;
    p.factors[1] = p.factors[0];
    airl_fast::multiply(p, 3, threads);
  }
  return sound;
}

bool every_product() {
  if (!airl_fast::products_ready()) return true;
  bool sound = true;
  for (std::int64_t m : {1, 31, 33, 70}) {
    for (std::int64_t k : {1, 15, 17, 33, 64, 1030}) {
      for (std::int64_t n : {1, 15, 32, 49}) {
        for (int layout = 0; layout < 4; ++layout) {
          sound &= products(m, k, n, layout, 1 + layout);
        }
      }
    }
  }
  return sound;
}
#else
bool every_product() { return true; }
#endif

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
    for (std::int64_t width : {1, 2, 15, 16, 34, 130}) sound &= layers(5, width, 2);
    for (std::int64_t vocab : {1, 18, 512, 1100}) sound &= draws(5, vocab, 2);
    for (std::int64_t size : {1, 24, 70}) {
      for (std::int64_t window : {1, 4, 1 << 30}) sound &= attention(37, size, window, 2);
      for (std::int64_t window : {1, 40, 1 << 30}) {
        for (std::int64_t shared : {1, 70, 530}) sound &= packed(shared, size, size, window, 2);
        sound &= packed(100, size, 33, window, 3);
      }
    }
  }
  sound &= every_product();
  sound &= discriminator<float>() && discriminator<double>();
  std::puts(sound ? "sound" : "a result is out of bounds");
  return sound ? 0 : 1;
}
