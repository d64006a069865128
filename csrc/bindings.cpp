// Python bindings: raw addresses, strides and sizes, so that no torch header is needed.
// The Python side checks shapes, dtypes, devices and offsets, and keeps the memory alive.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "segments.h"

namespace py = pybind11;

namespace {

using airl_fast::View;

template <typename T>
View<T> view(std::uintptr_t address, std::int64_t stride) {
  return {reinterpret_cast<const T*>(address), stride};
}

// Calls run(view) for x of float32 (item_size 4) or float64 (8), without the interpreter lock.
template <typename F>
void for_each_dtype(std::uintptr_t x, std::int64_t stride, std::int64_t item_size, F run) {
  if (item_size != 4 && item_size != 8) {
    throw std::invalid_argument("item_size must be 4 (float32) or 8 (float64)");
  }
  py::gil_scoped_release unlocked;
  item_size == 4 ? run(view<float>(x, stride)) : run(view<double>(x, stride));
}

const std::int32_t* offsets(std::uintptr_t address) {
  return reinterpret_cast<const std::int32_t*>(address);
}

float* output(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of airl_fast, over raw addresses; call the functions of airl_fast instead.";

  m.def(
      "segment_sum",
      [](std::uintptr_t x, std::int64_t stride, std::int64_t item_size, std::uintptr_t cu,
         std::int64_t spans, bool mean, std::uintptr_t out) {
        for_each_dtype(x, stride, item_size, [=](auto values) {
          airl_fast::segment_sum(values, offsets(cu), spans, mean, output(out));
        });
      },
      py::arg("x"), py::arg("stride"), py::arg("item_size"), py::arg("cu"), py::arg("spans"),
      py::arg("mean"), py::arg("out"));

  m.def(
      "segment_last",
      [](std::uintptr_t x, std::int64_t stride, std::int64_t item_size, std::uintptr_t cu,
         std::int64_t spans, std::uintptr_t out) {
        for_each_dtype(x, stride, item_size, [=](auto values) {
          airl_fast::segment_last(values, offsets(cu), spans, output(out));
        });
      },
      py::arg("x"), py::arg("stride"), py::arg("item_size"), py::arg("cu"), py::arg("spans"),
      py::arg("out"));

  m.def(
      "segment_softmax",
      [](std::uintptr_t x, std::int64_t stride, std::int64_t item_size, std::uintptr_t cu,
         std::int64_t spans, std::uintptr_t out) {
        for_each_dtype(x, stride, item_size, [=](auto values) {
          airl_fast::segment_softmax(values, offsets(cu), spans, output(out));
        });
      },
      py::arg("x"), py::arg("stride"), py::arg("item_size"), py::arg("cu"), py::arg("spans"),
      py::arg("out"));

  m.def(
      "discounted_scan",
      [](std::uintptr_t x, std::int64_t stride, std::int64_t item_size, std::uintptr_t cu,
         std::int64_t spans, double gamma, bool forwards, std::uintptr_t out) {
        for_each_dtype(x, stride, item_size, [=](auto values) {
          airl_fast::discounted_scan(values, offsets(cu), spans, gamma, forwards, output(out));
        });
      },
      py::arg("x"), py::arg("stride"), py::arg("item_size"), py::arg("cu"), py::arg("spans"),
      py::arg("gamma"), py::arg("forwards"), py::arg("out"));
}
