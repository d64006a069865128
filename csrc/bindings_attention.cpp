#include "bindings_attention.h"

#include <cstdint>
#include <tuple>

#include "row_attention.h"
#include "varlen_attention.h"

namespace py = pybind11;

namespace airl_fast {
namespace {

using At = std::uintptr_t;
using Heads = std::tuple<At, std::int64_t, std::int64_t>;  // address, strides of tokens and heads

static_assert(sizeof(VarlenSegment) == 5 * sizeof(std::int64_t), "rows of an int64 matrix");

const float* input(At address) { return reinterpret_cast<const float*>(address); }

float* output(At address) { return reinterpret_cast<float*>(address); }

PackedHeads heads_of(const Heads& heads) {
  return {input(std::get<0>(heads)), std::get<1>(heads), std::get<2>(heads)};
}

// heads, key heads, size, value size, window, scale
using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float>;

VarlenSizes sizes_of(const Sizes& s) {
  return {std::get<0>(s), std::get<1>(s), std::get<2>(s),
          std::get<3>(s), std::get<4>(s), std::get<5>(s)};
}

using Segments = std::tuple<At, std::int64_t>;  // address, count

VarlenInputs inputs_of(const Segments& segments, const Heads& q, const Heads& k, const Heads& v) {
  return {reinterpret_cast<const VarlenSegment*>(std::get<0>(segments)), std::get<1>(segments),
          heads_of(q), heads_of(k), heads_of(v)};
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def(
      "attend_rows",
      [](std::int64_t rows, std::int64_t heads, std::int64_t key_heads, std::int64_t size,
         std::int64_t tokens, std::int64_t room, std::int64_t own, std::int64_t window,
         At prompt_keys, At prompt_values, At starts, At counts, At own_keys, At own_values,
         At queries, At keys, At values, float scale, At out, int threads) {
        py::gil_scoped_release unlocked;
        attend_rows(
            {rows, heads, key_heads, size, tokens, room, own, window},
            {input(prompt_keys), input(prompt_values),
             reinterpret_cast<const std::int64_t*>(starts),
             reinterpret_cast<const std::int64_t*>(counts), output(own_keys), output(own_values)},
            input(queries), input(keys), input(values), scale, output(out), threads);
      },
      py::arg("rows"), py::arg("heads"), py::arg("key_heads"), py::arg("size"), py::arg("tokens"),
      py::arg("room"), py::arg("own"), py::arg("window"), py::arg("prompt_keys"),
      py::arg("prompt_values"), py::arg("starts"), py::arg("counts"), py::arg("own_keys"),
      py::arg("own_values"), py::arg("queries"), py::arg("keys"), py::arg("values"),
      py::arg("scale"), py::arg("out"), py::arg("threads"));
  m.def(
      "attend_segments",
      [](const Sizes& sizes, const Segments& segments, const Heads& queries, const Heads& keys,
         const Heads& values, At out, At statistics, int threads) {
        py::gil_scoped_release unlocked;
        attend_segments(sizes_of(sizes), inputs_of(segments, queries, keys, values), output(out),
                        output(statistics), threads);
      },
      py::arg("sizes"), py::arg("segments"), py::arg("queries"), py::arg("keys"),
      py::arg("values"), py::arg("out"), py::arg("statistics"), py::arg("threads"));
  m.def(
      "differentiate_segments",
      [](const Sizes& sizes, const Segments& segments, const Heads& queries, const Heads& keys,
         const Heads& values, At out, At statistics, const Heads& d_out, At d_queries, At d_keys,
         At d_values, std::int64_t tokens, int threads) {
        py::gil_scoped_release unlocked;
        differentiate_segments(sizes_of(sizes), inputs_of(segments, queries, keys, values),
                               input(out), input(statistics), heads_of(d_out),
                               {output(d_queries), output(d_keys), output(d_values), tokens},
                               threads);
      },
      py::arg("sizes"), py::arg("segments"), py::arg("queries"), py::arg("keys"),
      py::arg("values"), py::arg("out"), py::arg("statistics"), py::arg("d_out"),
      py::arg("d_queries"), py::arg("d_keys"), py::arg("d_values"), py::arg("tokens"),
      py::arg("threads"));
}

}  // namespace airl_fast
