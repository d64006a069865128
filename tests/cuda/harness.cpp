// Runs every CUDA kernel, emulated, over odd shapes in buffers of exactly the right size, for the
// sanitizers to watch; test_build.py compiles it. Targets and offsets out of range included.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "device.h"
#include "rows.h"
#include "spans.h"

namespace gpu = airl_fast::gpu;

namespace {

template <class T>
struct Logits {
  std::vector<T> memory;
  airl_fast::Chunk chunk;

  // Rows that start `offset` elements past a 16-byte boundary, the last one ending with the memory.
  Logits(std::int64_t rows, std::int64_t vocab, std::int64_t offset, std::int64_t gap,
         airl_fast::Element element)
      : memory(static_cast<std::size_t>(offset + (rows - 1) * (vocab + gap) + vocab)) {
    for (std::size_t i = 0; i < memory.size(); ++i) {
      airl_fast::narrow(static_cast<float>(i % 37) - 18.0f, &memory[i]);
    }
    chunk = {memory.data() + offset, vocab + gap, rows, vocab, element};
  }
};

constexpr std::int64_t kRows = 3;

template <class T>
void rows(std::int64_t vocab, std::int64_t offset, std::int64_t gap, airl_fast::Element element,
          airl_fast::Element gradient, bool shaped, const gpu::Plan& plan) {
  const std::vector<float> bias(static_cast<std::size_t>(vocab), 0.5f), half(kRows, 0.5f);
  const airl_fast::Head head{shaped ? bias.data() : nullptr, 0.7f, shaped ? 9.0f : 0.0f, 0.7f};
  const std::vector<std::int64_t> targets{vocab - 1, vocab, -100};
  std::vector<gpu::RowStats> stats(kRows);
  std::vector<float> logp(kRows), entropy(kRows);
  Logits<T> first(kRows, vocab, offset, gap, element), second = first;
  second.chunk.logits = second.memory.data() + offset;
  gpu::read_rows(first.chunk, head, targets.data(), plan, stats.data(), logp.data(),
                 entropy.data(), nullptr);
  gpu::differentiate_rows(first.chunk, head, targets.data(), stats.data(), half.data(),
                          half.data(), gradient, nullptr);
  gpu::policy_rows(second.chunk, head, targets.data(), plan,
                   {half.data(), half.data(), half.data(), half.data()},
                   {0.2f, 0.2f, 1.5f, 0.1f, 0.1f}, logp.data(), entropy.data(), gradient, nullptr);
}

void every_shape() {
  using airl_fast::Element;
  const gpu::Plan plans[] = {{1, 64, 2048}, {4, 32, 1024}, {2, 32, 0}};
  for (std::int64_t vocab : {1, 7, 10, 31, 515}) {
    for (std::int64_t offset : {0, 5}) {
      const auto& plan = plans[(vocab + offset) % 3];
      const bool shaped = vocab % 2 == 0;
      rows<float>(vocab, offset, 3, Element::kFloat32, Element::kFloat32, shaped, plan);
      rows<airl_fast::BFloat16>(vocab, offset, 1, Element::kBFloat16, Element::kBFloat16, shaped,
                                plan);
      rows<airl_fast::Float16>(vocab, offset, 0, Element::kFloat16, Element::kFloat16, shaped,
                               plan);
    }
    for (const auto& plan : plans) {
      const std::int64_t gap = (4 - vocab % 4) % 4;
      rows<float>(vocab, 0, gap, Element::kFloat32, Element::kBFloat16, true, plan);
      rows<float>(vocab, 0, gap, Element::kFloat32, Element::kFloat16, true, plan);
    }
  }
}

void spans(const std::vector<std::int32_t>& cu, const std::vector<std::int32_t>& sequences) {
  constexpr std::int64_t kValues = 300;
  const std::vector<float> x(kValues, 0.5f), weight(2 * 33, 0.1f);
  const auto count = static_cast<std::int64_t>(cu.size()) - 1;
  std::vector<float> out(kValues), f(cu.size()), reward(cu.size());
  const gpu::Vector vector{x.data(), 1};
  const gpu::Cuts cuts{cu.data(), count, kValues};
  const gpu::Cuts outer{sequences.data(), static_cast<std::int64_t>(sequences.size()) - 1, count};
  for (bool flag : {false, true}) {
    gpu::segment_sum(vector, cuts, flag, f.data(), nullptr);
    gpu::discounted_scan(vector, cuts, 0.9, flag, out.data(), nullptr);
    Logits<airl_fast::BFloat16> hidden(kValues, 33, 0, 0, airl_fast::Element::kBFloat16);
    gpu::score_spans({hidden.chunk, weight.data(), flag ? weight.data() : nullptr, flag ? 2 : 1,
                      0.9f},
                     cuts, outer, x.data(), flag, f.data(), reward.data(), nullptr);
  }
  gpu::segment_last(vector, cuts, f.data(), nullptr);
  gpu::segment_softmax(vector, cuts, out.data(), nullptr);
}

void discriminator() {
  const std::vector<float> f{-900, 0, 3, 900};
  const std::vector<unsigned char> is_expert{1, 0, 1, 0};
  for (std::int64_t count : {0, 1, 4}) {
    std::vector<double> scratch(static_cast<std::size_t>(gpu::discriminator_scratch(count)));
    std::vector<double> out(11), gradient(static_cast<std::size_t>(count));
    const double one = 1.0;
    for (bool critic : {false, true}) {
      const gpu::Spans all{{f.data(), 1}, {f.data(), 1}, {critic ? nullptr : f.data(), 1},
                           is_expert.data(), 1, count};
      gpu::discriminator_loss(all, {true, critic, 0.1, 2.0}, scratch.data(), out.data(), nullptr);
      gpu::discriminator_gradient(all, {true, critic, 0.1, 2.0}, &one, scratch.data(),
                                  gradient.data(), nullptr);
    }
  }
}

}  // namespace

int main() {
  every_shape();
  spans({0, 1, 299, 300}, {0, 2, 3});
  spans({0, 300}, {0, 1});
  spans({-5, 400, 7, 1 << 30, -(1 << 30), 300}, {0, 9, -3, 5});
  spans({0}, {0});
  discriminator();
  std::puts("sound");
  return 0;
}
