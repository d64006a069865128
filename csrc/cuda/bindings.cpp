// Python bindings of the CUDA kernels: raw addresses in GPU memory, sizes, strides and a stream.
// The Python side checks shapes, dtypes, devices and offsets, and keeps the memory alive. Nothing
// here waits for the GPU; what CUDA refuses is raised as RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "rows.h"
#include "spans.h"

#ifndef AIRL_FAST_CUDA_ARCHS
#define AIRL_FAST_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

namespace gpu = airl_fast::gpu;

using Where = std::tuple<int, std::uintptr_t>;  // device index, stream
using Head = std::tuple<std::uintptr_t, float, float, float>;  // as airl_fast::Head
using Plan = std::tuple<int, int, std::int64_t>;               // as gpu::Plan

// address, row stride in elements, rows, vocabulary, element (0 float32, 1 bfloat16, 2 float16)
using Chunk = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, int>;

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void* stream_of(const Where& where) { return at<void>(std::get<1>(where)); }

airl_fast::Element element_of(int element) {
  if (element < 0 || element > 2) {
    throw std::invalid_argument("expected an element of 0, 1 or 2, received " +
                                std::to_string(element));
  }
  return static_cast<airl_fast::Element>(element);
}

airl_fast::Head head_of(const Head& head) {
  return {at<const float>(std::get<0>(head)), std::get<1>(head), std::get<2>(head),
          std::get<3>(head)};
}

airl_fast::Chunk chunk_of(const Chunk& chunk) {
  const auto& [address, stride, rows, vocab, element] = chunk;
  return {at<void>(address), stride, rows, vocab, element_of(element)};
}

gpu::Plan plan_of(const Plan& plan) {
  return {std::get<0>(plan), std::get<1>(plan), std::get<2>(plan)};
}

using Vector = std::tuple<std::uintptr_t, std::int64_t>;              // address, stride
using Cuts = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;  // as gpu::Cuts

// f, logp, weight (address 0: ones), is_expert, S, whether the logit subtracts logp, label
// smoothing, temperature, whether it is the critic's ("wgan")
using Discriminator =
    std::tuple<Vector, Vector, Vector, Vector, std::int64_t, bool, double, double, bool>;

gpu::Vector vector_of(const Vector& x) { return {at<const float>(std::get<0>(x)), std::get<1>(x)}; }

gpu::Cuts cuts_of(const Cuts& cu) {
  return {at<const std::int32_t>(std::get<0>(cu)), std::get<1>(cu), std::get<2>(cu)};
}

gpu::Spans spans_of(const Discriminator& all) {
  const auto& [expert, stride] = std::get<3>(all);
  return {vector_of(std::get<0>(all)),     vector_of(std::get<1>(all)),
          vector_of(std::get<2>(all)),     at<const unsigned char>(expert),
          stride,                          std::get<4>(all)};
}

gpu::DiscriminatorOptions options_of(const Discriminator& all) {
  return {std::get<5>(all), std::get<8>(all), std::get<6>(all), std::get<7>(all)};
}

template <class Planner>
Plan plan_for(Planner planner, const Chunk& chunk, int major, std::int64_t shared_bytes,
              int processors) {
  const gpu::Plan plan = planner(chunk_of(chunk), {major, shared_bytes, processors});
  return {plan.cluster, plan.threads, plan.kept_bytes};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of airl_fast, over raw addresses; call the functions of airl_fast instead.";
  m.attr("architectures") = AIRL_FAST_CUDA_ARCHS;

  m.def(
      "plan_read",
      [](const Chunk& chunk, int major, std::int64_t shared_bytes, int processors) {
        return plan_for(gpu::plan_read, chunk, major, shared_bytes, processors);
      },
      py::arg("chunk"), py::arg("major"), py::arg("shared_bytes"), py::arg("processors"));

  m.def(
      "plan_policy",
      [](const Chunk& chunk, int major, std::int64_t shared_bytes, int processors) {
        return plan_for(gpu::plan_policy, chunk, major, shared_bytes, processors);
      },
      py::arg("chunk"), py::arg("major"), py::arg("shared_bytes"), py::arg("processors"));

  m.def(
      "read_rows",
      [](const Where& where, const Chunk& chunk, const Head& head, std::uintptr_t targets,
         std::uintptr_t stats, std::uintptr_t logp, std::uintptr_t entropy,
         const std::optional<Plan>& plan) {
        const auto rows = chunk_of(chunk);
        const gpu::OnDevice device(std::get<0>(where));
        gpu::read_rows(rows, head_of(head), at<const std::int64_t>(targets),
                       plan ? plan_of(*plan) : gpu::plan_read(rows, device.describe()),
                       at<gpu::RowStats>(stats), at<float>(logp), at<float>(entropy),
                       stream_of(where));
      },
      py::arg("where"), py::arg("chunk"), py::arg("head"), py::arg("targets"), py::arg("stats"),
      py::arg("logp"), py::arg("entropy"), py::arg("plan") = py::none());

  m.def(
      "differentiate_rows",
      [](const Where& where, const Chunk& chunk, const Head& head, std::uintptr_t targets,
         std::uintptr_t stats, std::uintptr_t d_logp, std::uintptr_t d_entropy, int gradient) {
        const gpu::OnDevice device(std::get<0>(where));
        gpu::differentiate_rows(chunk_of(chunk), head_of(head), at<const std::int64_t>(targets),
                                at<const gpu::RowStats>(stats), at<const float>(d_logp),
                                at<const float>(d_entropy), element_of(gradient),
                                stream_of(where));
      },
      py::arg("where"), py::arg("chunk"), py::arg("head"), py::arg("targets"), py::arg("stats"),
      py::arg("d_logp"), py::arg("d_entropy"), py::arg("gradient"));

  m.def(
      "policy_rows",
      [](const Where& where, const Chunk& chunk, const Head& head, std::uintptr_t targets,
         const std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>& actions,
         const std::tuple<float, float, float, float, float>& options, std::uintptr_t logp,
         std::uintptr_t entropy, int gradient, const std::optional<Plan>& plan) {
        const auto rows = chunk_of(chunk);
        const gpu::OnDevice device(std::get<0>(where));
        const auto& [advantages, old_logp, ref_logp, share] = actions;
        const auto& [clip_low, clip_high, delta, beta, entropy_coef] = options;
        gpu::policy_rows(rows, head_of(head), at<const std::int64_t>(targets),
                         plan ? plan_of(*plan) : gpu::plan_policy(rows, device.describe()),
                         {at<const float>(advantages), at<const float>(old_logp),
                          at<const float>(ref_logp), at<const float>(share)},
                         {clip_low, clip_high, delta, beta, entropy_coef}, at<float>(logp),
                         at<float>(entropy), element_of(gradient), stream_of(where));
      },
      py::arg("where"), py::arg("chunk"), py::arg("head"), py::arg("targets"), py::arg("actions"),
      py::arg("options"), py::arg("logp"), py::arg("entropy"), py::arg("gradient"),
      py::arg("plan") = py::none());

  m.def(
      "segment_sum",
      [](const Where& where, const Vector& x, const Cuts& cu, bool mean, std::uintptr_t out) {
        const gpu::OnDevice device(std::get<0>(where));
        gpu::segment_sum(vector_of(x), cuts_of(cu), mean, at<float>(out), stream_of(where));
      },
      py::arg("where"), py::arg("x"), py::arg("cu"), py::arg("mean"), py::arg("out"));

  m.def(
      "segment_last",
      [](const Where& where, const Vector& x, const Cuts& cu, std::uintptr_t out) {
        const gpu::OnDevice device(std::get<0>(where));
        gpu::segment_last(vector_of(x), cuts_of(cu), at<float>(out), stream_of(where));
      },
      py::arg("where"), py::arg("x"), py::arg("cu"), py::arg("out"));

  m.def(
      "segment_softmax",
      [](const Where& where, const Vector& x, const Cuts& cu, std::uintptr_t out) {
        const gpu::OnDevice device(std::get<0>(where));
        gpu::segment_softmax(vector_of(x), cuts_of(cu), at<float>(out), stream_of(where));
      },
      py::arg("where"), py::arg("x"), py::arg("cu"), py::arg("out"));

  m.def(
      "discounted_scan",
      [](const Where& where, const Vector& x, const Cuts& cu, double gamma, bool forwards,
         std::uintptr_t out) {
        const gpu::OnDevice device(std::get<0>(where));
        gpu::discounted_scan(vector_of(x), cuts_of(cu), gamma, forwards, at<float>(out),
                             stream_of(where));
      },
      py::arg("where"), py::arg("x"), py::arg("cu"), py::arg("gamma"), py::arg("forwards"),
      py::arg("out"));

  m.def(
      "score_spans",
      [](const Where& where, const Chunk& hidden, std::uintptr_t weight, std::uintptr_t bias,
         int rows, float gamma, const Cuts& cu, const Cuts& sequences, std::uintptr_t logp,
         bool mean, std::uintptr_t f, std::uintptr_t reward) {
        const gpu::OnDevice device(std::get<0>(where));
        gpu::score_spans(
            {chunk_of(hidden), at<const float>(weight), at<const float>(bias), rows, gamma},
            cuts_of(cu), cuts_of(sequences), at<const float>(logp), mean, at<float>(f),
            at<float>(reward), stream_of(where));
      },
      py::arg("where"), py::arg("hidden"), py::arg("weight"), py::arg("bias"), py::arg("rows"),
      py::arg("gamma"), py::arg("cu"), py::arg("sequences"), py::arg("logp"), py::arg("mean"),
      py::arg("f"), py::arg("reward"));

  m.def("discriminator_scratch", &gpu::discriminator_scratch, py::arg("spans"));

  m.def(
      "discriminator_loss",
      [](const Where& where, const Discriminator& all, std::uintptr_t scratch,
         std::uintptr_t out) {
        const gpu::OnDevice device(std::get<0>(where));
        gpu::discriminator_loss(spans_of(all), options_of(all), at<double>(scratch),
                                at<double>(out), stream_of(where));
      },
      py::arg("where"), py::arg("spans"), py::arg("scratch"), py::arg("out"));

  m.def(
      "discriminator_gradient",
      [](const Where& where, const Discriminator& all, std::uintptr_t grad,
         std::uintptr_t scratch, std::uintptr_t out) {
        const gpu::OnDevice device(std::get<0>(where));
        gpu::discriminator_gradient(spans_of(all), options_of(all), at<const double>(grad),
                                    at<double>(scratch), at<double>(out), stream_of(where));
      },
      py::arg("where"), py::arg("spans"), py::arg("grad"), py::arg("scratch"), py::arg("out"));
}
