// The kernels of layer.h, written once over a vector type, as those of rows_kernels.h, which
// includes this.
#pragma once

#include <cmath>
#include <cstdint>

namespace airl_fast {

struct LayerKernels {
  void (*norm)(std::int64_t width, const float* x, const float* weight, float epsilon, float* out,
               float* scale);
  void (*norm_gradient)(std::int64_t width, const float* grad, const float* x, const float* weight,
                        float scale, float* out);
  void (*gate)(std::int64_t width, const float* gate, const float* up, float* out);
  void (*gate_gradient)(std::int64_t width, const float* grad, const float* gate, const float* up,
                        float* d_gate, float* d_up);
  void (*rotate)(std::int64_t half, const float* x, const float* cos, const float* sin, bool back,
                 float* out);
};

namespace {

template <class V, class T>
inline typename V::F load_first(const T* data, std::int64_t count);
template <class V, class T>
inline void store_first(T* data, typename V::F x, std::int64_t count);
template <class V>
inline typename V::F exponential(typename V::F x);

// Calls run(load, store, i) for a row's vectors from i on: load(p) takes the vector at p + i.
template <class V, class Run>
inline void each_vector(std::int64_t width, Run run) {
  std::int64_t i = 0;
  for (; i + V::kWidth <= width; i += V::kWidth) {
    run([i](const float* p) { return V::load(p + i); },
        [i](float* p, typename V::F x) { V::store(p + i, x); });
  }
  if (i < width) {
    const std::int64_t left = width - i;
    run([i, left](const float* p) { return load_first<V>(p + i, left); },
        [i, left](float* p, typename V::F x) { store_first<V>(p + i, x, left); });
  }
}

template <class V>
void norm(std::int64_t width, const float* x, const float* weight, float epsilon, float* out,
          float* scale) {
  auto squares = V::set(0.0f);
  each_vector<V>(width, [&](auto load, auto) {
    const auto v = load(x);
    squares = V::fma(v, v, squares);
  });
  const float mean = V::sum(squares) / static_cast<float>(width);
  *scale = 1.0f / std::sqrt(mean + epsilon);
  const auto by = V::set(*scale);
  each_vector<V>(width, [&](auto load, auto store) {
    store(out, V::mul(load(weight), V::mul(load(x), by)));
  });
}

template <class V>
void norm_gradient(std::int64_t width, const float* grad, const float* x, const float* weight,
                   float scale, float* out) {
  auto along = V::set(0.0f);
  each_vector<V>(width, [&](auto load, auto) {
    along = V::fma(V::mul(load(weight), load(grad)), load(x), along);
  });
  const float mean = V::sum(along) / static_cast<float>(width);
  const auto by = V::set(scale), back = V::set(scale * scale * scale * mean);
  each_vector<V>(width, [&](auto load, auto store) {
    const auto u = V::mul(V::mul(load(weight), load(grad)), by);
    store(out, V::fnma(load(x), back, u));
  });
}

// 1 / (1 + exp(-x)), at least that of -88, 6e-39.
template <class V>
inline typename V::F sigmoid(typename V::F x) {
  const auto one = V::set(1.0f);
  const auto least = V::max(V::set(-88.0f), x);  // in this order NaN stays NaN
  return V::div(one, V::add(one, exponential<V>(V::sub(V::set(0.0f), least))));
}

template <class V>
void gate(std::int64_t width, const float* gate, const float* up, float* out) {
  each_vector<V>(width, [&](auto load, auto store) {
    const auto g = load(gate);
    store(out, V::mul(V::mul(g, sigmoid<V>(g)), load(up)));
  });
}

template <class V>
void gate_gradient(std::int64_t width, const float* grad, const float* gate, const float* up,
                   float* d_gate, float* d_up) {
  const auto one = V::set(1.0f);
  each_vector<V>(width, [&](auto load, auto store) {
    const auto d = load(grad), g = load(gate), s = sigmoid<V>(g);
    const auto slope = V::mul(s, V::fma(g, V::sub(one, s), one));
    const auto at_up = V::mul(d, V::mul(g, s)), at_gate = V::mul(V::mul(d, load(up)), slope);
    store(d_gate, at_gate);
    store(d_up, at_up);
  });
}

template <class V>
void rotate(std::int64_t half, const float* x, const float* cos, const float* sin, bool back,
            float* out) {
  // x_i cos_i - x_j sin_i and x_j cos_j + x_i sin_j, each product rounded as torch rounds it;
  // the transpose: y_i cos_i + y_j sin_j and y_j cos_j - y_i sin_i.
  const float *low_sin = back ? sin + half : sin, *high_sin = back ? sin : sin + half;
  each_vector<V>(half, [&](auto load, auto store) {
    const auto low = load(x), high = load(x + half);
    const auto to_low = V::mul(high, load(low_sin)), to_high = V::mul(low, load(high_sin));
    const auto a = V::mul(low, load(cos)), b = V::mul(high, load(cos + half));
    store(out, back ? V::add(a, to_low) : V::sub(a, to_low));
    store(out + half, back ? V::sub(b, to_high) : V::add(b, to_high));
  });
}

template <class V>
constexpr LayerKernels layer_kernels_of() {
  return {norm<V>, norm_gradient<V>, gate<V>, gate_gradient<V>, rotate<V>};
}

}  // namespace
}  // namespace airl_fast
