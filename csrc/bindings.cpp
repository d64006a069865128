// Python bindings: raw addresses, strides and sizes, so that no torch header is needed.
// The Python side checks shapes, dtypes, devices and offsets, and keeps the memory alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings_attention.h"
#include "bindings_eager.h"
#include "discriminator.h"
#include "draw.h"
#include "layer.h"
#include "products.h"
#include "rows.h"
#include "segments.h"

namespace py = pybind11;

namespace {

using airl_fast::View;

template <typename T>
View<T> view(std::uintptr_t address, std::int64_t stride) {
  return {reinterpret_cast<const T*>(address), stride};
}

// address, stride in elements, item size, values
using Values = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;
using Spans = std::tuple<std::uintptr_t, std::int64_t>;  // address of the offsets, spans

// Calls run(view, offsets) for x of float32 (item size 4) or float64 (8), without the interpreter
// lock. Offsets that are no partition of the values are refused before any value is touched.
template <typename F>
void for_each_dtype(const Values& x, const Spans& spans, F run) {
  const auto [address, stride, item_size, total] = x;
  if (item_size != 4 && item_size != 8) {
    throw std::invalid_argument("item_size must be 4 (float32) or 8 (float64)");
  }
  const airl_fast::Offsets at{reinterpret_cast<const std::int32_t*>(std::get<0>(spans)),
                              std::get<1>(spans)};
  if (at.spans < 0 || !airl_fast::partitions(at, total)) {
    throw std::invalid_argument("expected offsets that run from 0 to " + std::to_string(total) +
                                ", the number of values, and rise at every step; received others: "
                                "check that both describe the same batch");
  }
  py::gil_scoped_release unlocked;
  item_size == 4 ? run(view<float>(address, stride), at) : run(view<double>(address, stride), at);
}

const float* input(std::uintptr_t address) { return reinterpret_cast<const float*>(address); }

float* output(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

using Head = std::tuple<std::uintptr_t, float, float, float>;  // as airl_fast::Head

airl_fast::Head head_of(const Head& head) {
  return {reinterpret_cast<const float*>(std::get<0>(head)), std::get<1>(head), std::get<2>(head),
          std::get<3>(head)};
}

// address, row stride in elements, rows, vocabulary, element (0 float32, 1 bfloat16, 2 float16)
using Chunk = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, int>;

airl_fast::Chunk chunk_of(const Chunk& chunk) {
  const auto& [address, stride, rows, vocab, element] = chunk;
  if (vocab < 1 || element < 0 || element > 2) {
    throw std::invalid_argument("a chunk needs a vocabulary of at least 1 and an element 0, 1 or 2");
  }
  return {reinterpret_cast<void*>(address), stride, rows, vocab,
          static_cast<airl_fast::Element>(element)};
}

airl_fast::RowStats* stats_at(std::uintptr_t address) {
  return reinterpret_cast<airl_fast::RowStats*>(address);
}

using Vector = std::tuple<std::uintptr_t, std::int64_t>;  // address or 0, stride in elements

// (f, logp, weight), their item_size, is_expert, S, and the options; the last is wgan's.
using Discriminator = std::tuple<Vector, Vector, Vector, std::int64_t, Vector, std::int64_t, bool,
                                 double, double, bool>;

template <typename T>
airl_fast::Spans<T> spans_of(const Discriminator& all) {
  const auto of = [](const Vector& v) { return view<T>(std::get<0>(v), std::get<1>(v)); };
  const Vector& expert = std::get<4>(all);
  return {of(std::get<0>(all)), of(std::get<1>(all)), of(std::get<2>(all)),
          reinterpret_cast<const unsigned char*>(std::get<0>(expert)), std::get<1>(expert),
          std::get<5>(all)};
}

// Calls run(spans, options), for float32 or float64, without the interpreter lock.
template <typename F>
void with_spans(const Discriminator& all, F run) {
  const std::int64_t size = std::get<3>(all);
  if (size != 4 && size != 8) throw std::invalid_argument("item_size must be 4 or 8");
  const airl_fast::DiscriminatorOptions options{std::get<6>(all), std::get<9>(all),
                                                std::get<7>(all), std::get<8>(all)};
  py::gil_scoped_release unlocked;
  size == 4 ? run(spans_of<float>(all), options) : run(spans_of<double>(all), options);
}

// address, row stride, column stride in elements, element (0 float32, 1 bfloat16)
using Operand = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, int>;

airl_fast::Operand operand_of(const Operand& operand) {
  const auto& [address, row_stride, column_stride, element] = operand;
  if ((row_stride != 1 && column_stride != 1) || element < 0 || element > 1) {
    throw std::invalid_argument("an operand needs a stride of 1 and an element 0 or 1");
  }
  return {reinterpret_cast<const void*>(address), static_cast<airl_fast::Element>(element),
          row_stride, column_stride};
}

// b, N, address and row stride of the result, and of what is added to it
using Factor = std::tuple<Operand, std::int64_t, std::uintptr_t, std::int64_t, std::uintptr_t,
                          std::int64_t>;

airl_fast::Product product_of(const Operand& a, const std::vector<Factor>& factors,
                              std::int64_t rows, std::int64_t inner) {
  if (!airl_fast::products_ready()) throw std::runtime_error("multiply needs a processor with AMX");
  if (factors.empty() || factors.size() > 3) throw std::invalid_argument("1, 2 or 3 factors");
  airl_fast::Product product{};
  product.a = operand_of(a);
  product.m = rows;
  product.k = inner;
  for (const auto& [b, n, out, out_stride, plus, plus_stride] : factors) {
    const airl_fast::Operand operand = operand_of(b);
    product.factors[product.count++] = {operand, n, output(out), out_stride,
                                        input(plus), plus_stride};
    if (operand.element != product.factors[0].b.element) {
      throw std::invalid_argument("factors of one dtype");
    }
  }
  return product;
}

const std::int64_t* targets_at(std::uintptr_t address) {
  return reinterpret_cast<const std::int64_t*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of airl_fast, over raw addresses; call the functions of airl_fast instead.";

  m.def(
      "segment_sum",
      [](const Values& x, const Spans& at, bool mean, int threads, std::uintptr_t out) {
        for_each_dtype(x, at, [=](auto values, airl_fast::Offsets offsets) {
          airl_fast::segment_sum(values, offsets, mean, threads, output(out));
        });
      },
      py::arg("x"), py::arg("at"), py::arg("mean"), py::arg("threads"), py::arg("out"));

  m.def(
      "segment_last",
      [](const Values& x, const Spans& at, int threads, std::uintptr_t out) {
        for_each_dtype(x, at, [=](auto values, airl_fast::Offsets offsets) {
          airl_fast::segment_last(values, offsets, threads, output(out));
        });
      },
      py::arg("x"), py::arg("at"), py::arg("threads"), py::arg("out"));

  m.def(
      "segment_softmax",
      [](const Values& x, const Spans& at, int threads, std::uintptr_t out) {
        for_each_dtype(x, at, [=](auto values, airl_fast::Offsets offsets) {
          airl_fast::segment_softmax(values, offsets, threads, output(out));
        });
      },
      py::arg("x"), py::arg("at"), py::arg("threads"), py::arg("out"));

  m.def(
      "discounted_scan",
      [](const Values& x, const Spans& at, double gamma, bool forwards, int threads,
         std::uintptr_t out) {
        for_each_dtype(x, at, [=](auto values, airl_fast::Offsets offsets) {
          airl_fast::discounted_scan(values, offsets, gamma, forwards, threads, output(out));
        });
      },
      py::arg("x"), py::arg("at"), py::arg("gamma"), py::arg("forwards"), py::arg("threads"),
      py::arg("out"));

  m.def(
      "read_rows",
      [](const Chunk& chunk, const Head& head, std::uintptr_t targets, std::int64_t first,
         int threads, std::uintptr_t stats, std::uintptr_t logp, std::uintptr_t entropy) {
        const auto rows = chunk_of(chunk);
        py::gil_scoped_release unlocked;
        airl_fast::read_rows(rows, head_of(head), targets_at(targets), first, threads,
                             stats_at(stats), output(logp), output(entropy));
      },
      py::arg("chunk"), py::arg("head"), py::arg("targets"), py::arg("first"), py::arg("threads"),
      py::arg("stats"), py::arg("logp"), py::arg("entropy"));

  m.def(
      "differentiate_rows",
      [](const Chunk& chunk, const Head& head, std::uintptr_t targets, std::int64_t first,
         int threads, std::uintptr_t stats, std::uintptr_t d_logp, std::uintptr_t d_entropy,
         std::uintptr_t gradient) {
        const auto rows = chunk_of(chunk);
        py::gil_scoped_release unlocked;
        airl_fast::differentiate_rows(rows, head_of(head), targets_at(targets), first, threads,
                                      stats_at(stats), output(d_logp), output(d_entropy),
                                      reinterpret_cast<void*>(gradient));
      },
      py::arg("chunk"), py::arg("head"), py::arg("targets"), py::arg("first"), py::arg("threads"),
      py::arg("stats"), py::arg("d_logp"), py::arg("d_entropy"), py::arg("gradient"));

  m.def(
      "weigh_rows",
      [](const Chunk& chunk, const Head& head, std::uintptr_t targets, std::int64_t first,
         int threads, std::uintptr_t stats, std::uintptr_t logp, std::uintptr_t entropy,
         std::uintptr_t tangent, std::uintptr_t sums, std::int64_t width) {
        const auto rows = chunk_of(chunk);
        if (rows.element != airl_fast::Element::kFloat32) {
          throw std::invalid_argument("weigh_rows takes float32 alone");
        }
        py::gil_scoped_release unlocked;
        airl_fast::weigh_rows(rows, head_of(head), targets_at(targets), first, threads,
                              stats_at(stats), output(logp), output(entropy), output(tangent),
                              output(sums), width);
      },
      py::arg("chunk"), py::arg("head"), py::arg("targets"), py::arg("first"), py::arg("threads"),
      py::arg("stats"), py::arg("logp"), py::arg("entropy"), py::arg("tangent"), py::arg("sums"),
      py::arg("width"));

  m.def(
      "discriminator_loss",
      [](const Discriminator& spans, std::uintptr_t out) {
        with_spans(spans, [=](const auto& values, const auto& options) {
          airl_fast::discriminator_loss(values, options, reinterpret_cast<double*>(out));
        });
      },
      py::arg("spans"), py::arg("out"));

  m.def(
      "discriminator_gradient",
      [](const Discriminator& spans, double grad, std::uintptr_t out) {
        with_spans(spans, [=](const auto& values, const auto& options) {
          airl_fast::discriminator_gradient(values, options, grad,
                                            reinterpret_cast<double*>(out));
        });
      },
      py::arg("spans"), py::arg("grad"), py::arg("out"));

  m.attr("GATE_INNER") = airl_fast::kGateInner;
  m.def("products_ready", &airl_fast::products_ready);
  m.def(
      "multiply",
      [](const Operand& a, const std::vector<Factor>& factors, std::int64_t rows,
         std::int64_t inner, bool add, bool gate, std::uintptr_t norm, float epsilon, int parts,
         int threads) {
        airl_fast::Product product = product_of(a, factors, rows, inner);
        if (parts < 1 || parts > 3) throw std::invalid_argument("parts must be 1, 2 or 3");
        if (gate && (product.count != 2 || product.factors[0].n != product.factors[1].n ||
                     inner > airl_fast::kGateInner)) {
          throw std::invalid_argument("a gate needs two factors of one shape, and a short inner");
        }
        if (norm != 0 && (product.a.element != airl_fast::Element::kFloat32 ||
                          product.a.column_stride != 1)) {
          throw std::invalid_argument("a norm needs float32 rows");
        }
        product.add = add;
        product.gate = gate;
        product.norm = input(norm);
        product.epsilon = epsilon;
        py::gil_scoped_release unlocked;
        airl_fast::multiply(product, parts, threads);
      },
      py::arg("a"), py::arg("factors"), py::arg("rows"), py::arg("inner"), py::arg("add"),
      py::arg("gate"), py::arg("norm"), py::arg("epsilon"), py::arg("parts"), py::arg("threads"));
  using At = std::uintptr_t;
  using Size = std::tuple<std::int64_t, std::int64_t>;  // rows, width
  const auto extent = [](const Size& size) {
    return airl_fast::Extent{std::get<0>(size), std::get<1>(size)};
  };
  m.def(
      "norm_rows",
      [=](const Size& size, At x, At weight, float epsilon, int threads, At out, At scale) {
        py::gil_scoped_release unlocked;
        airl_fast::norm_rows(extent(size), input(x), input(weight), epsilon, output(out),
                             output(scale), threads);
      },
      py::arg("size"), py::arg("x"), py::arg("weight"), py::arg("epsilon"), py::arg("threads"),
      py::arg("out"), py::arg("scale"));
  m.def(
      "norm_gradient",
      [=](const Size& size, At grad, At x, At weight, At scale, int threads, At out) {
        py::gil_scoped_release unlocked;
        airl_fast::norm_gradient(extent(size), input(grad), input(x), input(weight), input(scale),
                                 output(out), threads);
      },
      py::arg("size"), py::arg("grad"), py::arg("x"), py::arg("weight"), py::arg("scale"),
      py::arg("threads"), py::arg("out"));
  m.def(
      "gate_rows",
      [=](const Size& size, At gate, At up, int threads, At out) {
        py::gil_scoped_release unlocked;
        airl_fast::gate_rows(extent(size), input(gate), input(up), output(out), threads);
      },
      py::arg("size"), py::arg("gate"), py::arg("up"), py::arg("threads"), py::arg("out"));
  m.def(
      "gate_gradient",
      [=](const Size& size, At grad, At gate, At up, int threads, At d_gate, At d_up) {
        py::gil_scoped_release unlocked;
        airl_fast::gate_gradient(extent(size), input(grad), input(gate), input(up),
                                 output(d_gate), output(d_up), threads);
      },
      py::arg("size"), py::arg("grad"), py::arg("gate"), py::arg("up"), py::arg("threads"),
      py::arg("d_gate"), py::arg("d_up"));
  m.def(
      "rotate_heads",
      [](At x, std::int64_t stride, std::int64_t tokens, std::int64_t heads, std::int64_t size,
         At cos, At sin, bool back, int threads, At out) {
        py::gil_scoped_release unlocked;
        airl_fast::rotate_heads({input(x), stride, tokens, heads, size}, input(cos), input(sin),
                                back, output(out), threads);
      },
      py::arg("x"), py::arg("stride"), py::arg("tokens"), py::arg("heads"), py::arg("size"),
      py::arg("cos"), py::arg("sin"), py::arg("back"), py::arg("threads"), py::arg("out"));
  m.def(
      "draw_rows",
      [](At logits, std::int64_t stride, std::int64_t rows, std::int64_t vocab, float scale, At u,
         At tokens, At logp, int threads) {
        py::gil_scoped_release unlocked;
        airl_fast::draw_rows(input(logits), stride, rows, vocab, scale,
                             reinterpret_cast<const double*>(u),
                             reinterpret_cast<std::int64_t*>(tokens), output(logp), threads);
      },
      py::arg("logits"), py::arg("stride"), py::arg("rows"), py::arg("vocab"), py::arg("scale"),
      py::arg("u"), py::arg("tokens"), py::arg("logp"), py::arg("threads"));

  airl_fast::bind_attention(m);
  airl_fast::bind_eager(m.ptr());

  m.def("vector_paths", &airl_fast::vector_paths);
  m.def("vector_path", &airl_fast::vector_path);
  m.def("use_vector_path", &airl_fast::use_vector_path, py::arg("name"));
  m.def(
      "advise_huge_pages",
      [](std::uintptr_t address, std::int64_t bytes) {
        airl_fast::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"));
}
