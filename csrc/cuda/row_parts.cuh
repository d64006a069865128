// What the row kernels are made of: a row as 16-byte vectors, its online statistics, its gradient.
#pragma once

#include "device.h"
#include "rows.h"

namespace airl_fast::gpu {

// 16-byte loads that a thread has under way; with a soft cap there is more to compute meanwhile.
template <bool kShaped>
constexpr int kBatch = kShaped ? 2 : 4;
constexpr int kMaxThreads = 1024;
constexpr float kNone = -HUGE_VALF;  // the maximum of nothing

template <class T>
constexpr int kWidth = static_cast<int>(16 / sizeof(T));

// A row is a few elements up to the first 16-byte boundary, vectors, and a few elements.
template <class T>
struct Row {
  T* data;
  int vocab, head, vectors;

  __device__ Row(const Chunk& chunk, std::int64_t row)
      : data(static_cast<T*>(chunk.logits) + row * chunk.row_stride),
        vocab(static_cast<int>(chunk.vocab)) {
    const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(data) / sizeof(T)) &
                     (kWidth<T> - 1);
    head = past == 0 ? 0 : kWidth<T> - past;
    if (head > vocab) head = vocab;
    vectors = (vocab - head) / kWidth<T>;
  }
  __device__ int first_of(int vector) const { return head + vector * kWidth<T>; }
  __device__ T* at(int vector) const { return data + first_of(vector); }
  __device__ int edges() const { return vocab - vectors * kWidth<T>; }
  __device__ int edge(int i) const { return i < head ? i : i + vectors * kWidth<T>; }
};

template <class T>
__device__ __forceinline__ void unpack(uint4 bits, float (&x)[kWidth<T>]) {
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = bits_float(words[i]);
    } else {
      T low, high;
      low.bits = static_cast<std::uint16_t>(words[i] & 0xffffu);
      high.bits = static_cast<std::uint16_t>(words[i] >> 16);
      x[2 * i] = to_float(low);
      x[2 * i + 1] = to_float(high);
    }
  }
}

template <class T>
__device__ __forceinline__ uint4 packed(const float (&x)[kWidth<T>]) {
  if constexpr (sizeof(T) == 4) {
    return {float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
  } else {
    return {pack(x[0], x[1], T{}), pack(x[2], x[3], T{}), pack(x[4], x[5], T{}),
            pack(x[6], x[7], T{})};
  }
}

// tanh(y) and 1 - tanh(y)^2, as in ../rows_kernels.h, which has the reasons.
__device__ __forceinline__ void tanh_and_slope(float y, float* value, float* slope) {
  const float size = fabsf(y), square = y * y;
  if (size < 0.625f) {
    float q = -5.717044953e-03f;
    q = fmaf(q, square, 2.065058722e-02f);
    q = fmaf(q, square, -5.374349806e-02f);
    q = fmaf(q, square, 1.333149129e-01f);
    q = fmaf(q, square, -3.333328393e-01f);
    *value = fmaf(q, square * y, y);
    *slope = fmaf(-*value, *value, 1.0f);
  } else {
    const float u = __fdividef(2.0f, __expf(2.0f * (size > 20.0f ? 20.0f : size)) + 1.0f);
    *value = copysignf(1.0f - u, y);
    *slope = u * (2.0f - u);
  }
}

// z of a logit; with kShaped there is a bias or a soft cap. *slope is dz/da over head.slope.
template <bool kShaped>
__device__ __forceinline__ float shaped(float a, int at, const Head& head, float* slope) {
  *slope = 1.0f;
  if constexpr (!kShaped) {
    return a * head.inner;
  } else {
    const float x = (head.bias == nullptr ? a : a + head.bias[at]) * head.inner;
    if (head.outer == 0.0f) return x;
    float value;
    tanh_and_slope(x, &value, slope);
    return value * head.outer;
  }
}

// Statistics of some of a row's logits, relative to their own maximum; of none: sum and gap 0.
struct Partial {
  float largest, sum, gap;
};

// As relative to `top`, which is at least the partial's own maximum.
__device__ __forceinline__ Partial raised(const Partial& part, float top) {
  const float rise = top - part.largest, shrink = __expf(-rise);
  return {top, shrink * part.sum, shrink * (part.sum == 0.0f ? part.gap : part.gap + rise * part.sum)};
}

// What exponents are relative to: 0 where nothing but -inf has been seen.
__device__ __forceinline__ float base_of(float largest) { return largest == kNone ? 0.0f : largest; }

// Commutative to the last bit: all lanes and blocks that merge the same partials agree.
__device__ __forceinline__ Partial merged(const Partial& a, const Partial& b) {
  const float largest = fmaxf(a.largest, b.largest), top = base_of(largest);
  const Partial x = raised(a, top), y = raised(b, top);
  return {largest, x.sum + y.sum, x.gap + y.gap};
}

template <int kCount>
__device__ __forceinline__ void accumulate(const float (&z)[kCount], Partial* part) {
  float largest = z[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, z[i]);
  if (largest > part->largest) *part = raised(*part, largest);
  const float top = base_of(part->largest);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float e = __expf(z[i] - top);
    part->sum += e;
    part->gap = fmaf(e, top - z[i], part->gap);
  }
}

// Reads a thread's share of a row: vectors share, share + sharers, ..., and an element of the edges,
// which is left in *edge. The first `kept_rounds` vectors are also written to a column of slots.
template <class T, bool kShaped>
__device__ __forceinline__ Partial read_share(const Row<T>& row, const Head& head, int share,
                                              int sharers, unsigned char* kept, int kept_pitch,
                                              int kept_rounds, float* edge) {
  Partial part = {kNone, 0.0f, 0.0f};
  float slope;
  for (int round = 0, first = share; first < row.vectors;
       round += kBatch<kShaped>, first += kBatch<kShaped> * sharers) {
    uint4 bits[kBatch<kShaped>];
#pragma unroll
    for (int i = 0; i < kBatch<kShaped>; ++i) {
      if (first + i * sharers < row.vectors) bits[i] = load16(row.at(first + i * sharers));
    }
#pragma unroll
    for (int i = 0; i < kBatch<kShaped>; ++i) {
      const int vector = first + i * sharers;
      if (vector >= row.vectors) break;
      if (round + i < kept_rounds) store16(kept + (round + i) * kept_pitch, bits[i]);
      float x[kWidth<T>];
      unpack<T>(bits[i], x);
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) {
        x[k] = shaped<kShaped>(x[k], row.first_of(vector) + k, head, &slope);
      }
      accumulate(x, &part);
    }
  }
  if (share < row.edges()) {
    const int at = row.edge(share);
    *edge = to_float(row.data[at]);
    const float z[1] = {shaped<kShaped>(*edge, at, head, &slope)};
    accumulate(z, &part);
  }
  return part;
}

// z of the target; NaN where it is no column.
template <class T, bool kShaped>
__device__ __forceinline__ float target_z(const Row<T>& row, const Head& head,
                                          std::int64_t target) {
  if (target < 0 || target >= row.vocab) return NAN;
  const int at = static_cast<int>(target);
  float slope;
  return shaped<kShaped>(to_float(row.data[at]), at, head, &slope);
}

__device__ __forceinline__ float logp_of(const RowStats& stats) {
  return (stats.target - stats.largest) - logf(stats.sum);
}

__device__ __forceinline__ float entropy_of(const RowStats& stats) {
  return logf(stats.sum) + stats.gap / stats.sum;
}

// The gradient at z is exp(x) (c0 + c1 (x + gap)), x = z - top, and at the target at_target.
struct Coefficients {
  float top, c0, c1, gap, at_target;
  int target;  // -1 for none
};

__device__ __forceinline__ Coefficients coefficients_of(const RowStats& stats, const Head& head,
                                                        std::int64_t target, std::int64_t vocab,
                                                        float d_logp, float d_entropy) {
  const float scale = head.slope / stats.sum, gap = stats.gap / stats.sum;
  const float x = stats.target - stats.largest, logp = x - logf(stats.sum);
  // 1 - p as -expm1(log p): a difference would lose its digits where p nears 1.
  float g = -d_logp * expm1f(logp);
  if (d_entropy != 0.0f) g -= d_entropy * expf(logp) * (x + gap);
  const bool sound = target >= 0 && target < vocab;
  return {stats.largest, sound ? -scale * d_logp : NAN, -scale * d_entropy, gap, head.slope * g,
          sound ? static_cast<int>(target) : -1};
}

template <bool kShaped>
__device__ __forceinline__ float gradient_at(float a, int at, const Head& head,
                                             const Coefficients& c) {
  float slope;
  const float x = shaped<kShaped>(a, at, head, &slope) - c.top;
  const float factor = c.c1 == 0.0f ? c.c0 : fmaf(c.c1, x + c.gap, c.c0);
  const float g = at == c.target ? c.at_target : __expf(x) * factor;
  return kShaped ? g * slope : g;
}

// Stores a vector's gradient where the row of gradients, which begins where the logits do, has it.
template <class T, class U, bool kShaped>
__device__ __forceinline__ void write_vector(const Row<T>& row, int vector, uint4 bits,
                                             const Head& head, const Coefficients& c) {
  float x[kWidth<T>];
  unpack<T>(bits, x);
  const int first = row.first_of(vector);
#pragma unroll
  for (int k = 0; k < kWidth<T>; ++k) x[k] = gradient_at<kShaped>(x[k], first + k, head, c);
  U* out = reinterpret_cast<U*>(row.data) + first;
  if constexpr (sizeof(U) == sizeof(T)) {
    store16(out, packed<T>(x));
  } else {
    store8(out, {pack(x[0], x[1], U{}), pack(x[2], x[3], U{})});
  }
}

// Turns vectors [begin, end) into their gradient, `step` at a time, this thread being `offset`.
// Where the gradient is narrower it goes where logits of a lower column were: none of a batch is
// written before all threads have read all of it, and what comes after lies beyond it.
template <class T, class U, bool kShaped>
__device__ __forceinline__ void write_vectors(const Row<T>& row, const Head& head,
                                              const Coefficients& c, int begin, int end,
                                              int offset, int step) {
  for (; begin < end; begin += kBatch<kShaped> * step) {
    uint4 bits[kBatch<kShaped>];
#pragma unroll
    for (int i = 0; i < kBatch<kShaped>; ++i) {
      const int vector = begin + i * step + offset;
      if (vector < end) bits[i] = load16(row.at(vector));
    }
    if (sizeof(U) != sizeof(T)) cluster_barrier();
#pragma unroll
    for (int i = 0; i < kBatch<kShaped>; ++i) {
      const int vector = begin + i * step + offset;
      if (vector < end) write_vector<T, U, kShaped>(row, vector, bits[i], head, c);
    }
  }
}

template <class T, class U, bool kShaped>
__device__ __forceinline__ void write_edge(const Row<T>& row, const Head& head,
                                           const Coefficients& c, int share, float edge) {
  if (share >= row.edges()) return;
  const int at = row.edge(share);
  from_float(gradient_at<kShaped>(edge, at, head, c), reinterpret_cast<U*>(row.data) + at);
}

}  // namespace airl_fast::gpu
