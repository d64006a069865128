// Operands cut into parts and tiles for products_amx.cpp, which includes this between the target's
// pragmas, after immintrin.h; in an unnamed namespace like everything compiled for one instruction
// set.
//
// A tile of a holds 16 rows x 32 k, one of b 32 k x 16 columns, with two k after one another for
// each column.
#pragma once

#include <cmath>
#include <cstdint>

#include "half.h"
#include "products.h"

namespace airl_fast {
namespace {

using Int = std::int64_t;
using Bits = std::uint16_t;  // of a bfloat16

constexpr Int kTile = 16 * 32;  // bfloat16 of a tile: a KiB
constexpr Int kSide = 32;       // rows and columns of a block of tiles, and its k

Int blocks_of(Int count) { return (count + kSide - 1) / kSide; }

__mmask16 first(Int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1u);
}

__m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }

__m512 load(const BFloat16* p, __mmask16 mask) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

// What is left of 16 numbers without a part of them.
__m512 rest(__m512 x, __m256i part) {
  return _mm512_sub_ps(
      x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
}

// The parts of 32 numbers, low and high, one vector for each part.
template <int kParts>
void split(__m512 low, __m512 high, __m512i* parts) {
  for (int part = 0; part < kParts; ++part) {
    const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    parts[part] = bits;
    low = rest(low, _mm512_castsi512_si256(bits));
    high = rest(high, _mm512_extracti64x4_epi64(bits, 1));
  }
}

// Transposes 16 x 16 numbers of 32 bits.
void transpose(__m512i* v) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(w[i + 4], w[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(w[i + 4], w[i + 12], 0xdd);
  }
}

// 16 lines x 32 k of an operand; a line is a row of a or a column of b.
template <typename T>
struct Lines {
  const T* data;
  Int line_stride, k_stride;  // one of them is 1
  Int lines, k;               // what there is of them; the rest counts as zero
  const float* scale;         // of each line, and
  const float* norm;          // of each k, or null
};

// Writes the tiles of all parts of some lines, `between` numbers apart: with kPairs as b's, where a
// row of the tile holds a pair of k of all lines, else as a's, where it holds all k of a line.
template <int kParts, bool kPairs, typename T>
void fill(const Lines<T>& from, Bits* out, Int between) {
  __m512i tile[kParts][16], one[kParts];
  const bool by_line = from.k_stride == 1;
  for (int row = 0; row < 16; ++row) {
    __m512 low = _mm512_setzero_ps(), high = low;
    if (by_line) {
      if (row < from.lines) {
        const T* x = from.data + row * from.line_stride;
        low = load(x, first(from.k));
        if (from.k > 16) high = load(x + 16, first(from.k - 16));
        if (from.norm != nullptr) {
          const __m512 scale = _mm512_set1_ps(from.scale[row]);
          low = _mm512_mul_ps(load(from.norm, first(from.k)), _mm512_mul_ps(low, scale));
          if (from.k > 16) {
            high = _mm512_mul_ps(load(from.norm + 16, first(from.k - 16)),
                                 _mm512_mul_ps(high, scale));
          }
        }
      }
      split<kParts>(low, high, one);
    } else {
      const T* x = from.data + 2 * row * from.k_stride;
      if (2 * row < from.k) low = load(x, first(from.lines));
      if (2 * row + 1 < from.k) high = load(x + from.k_stride, first(from.lines));
      split<kParts>(low, high, one);
      const __m512i order = _mm512_setr_epi32(  // 0, 16, 1, 17, ...
          0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005, 0x00160006,
          0x00170007, 0x00180008, 0x00190009, 0x001a000a, 0x001b000b, 0x001c000c, 0x001d000d,
          0x001e000e, 0x001f000f);
      for (int p = 0; p < kParts; ++p) one[p] = _mm512_permutexvar_epi16(order, one[p]);
    }
    for (int p = 0; p < kParts; ++p) tile[p][row] = one[p];
  }
  for (int p = 0; p < kParts; ++p) {
    if (by_line == kPairs) transpose(tile[p]);
    for (int row = 0; row < 16; ++row) {
      _mm512_store_si512(out + p * between + row * 32, tile[p][row]);
    }
  }
}

// The tiles of a block, [k block][part][half of the block][tile], from line and k on; `scale` is of
// the block's lines, `norm` of the slice's k.
template <int kParts, bool kPairs, typename T>
void fill_block(const Operand& from, Int line, Int lines, Int k, Int slice, const float* scale,
                const float* norm, Bits* out) {
  const Int line_stride = kPairs ? from.column_stride : from.row_stride;
  const Int k_stride = kPairs ? from.row_stride : from.column_stride;
  const T* data = static_cast<const T*>(from.data) + line * line_stride + k * k_stride;
  for (Int at = 0; at < slice; at += kSide) {
    for (Int half = 0; half < 2; ++half, out += kTile) {
      fill<kParts, kPairs>(
          Lines<T>{data + half * 16 * line_stride + at * k_stride, line_stride, k_stride,
                   lines - half * 16, slice - at, scale + half * 16,
                   norm == nullptr ? nullptr : norm + at},
          out, 2 * kTile);
    }
    out += (kParts - 1) * 2 * kTile;
  }
}

// One over the root mean square of some rows.
void inverse_norms(const Product& p, Int row, Int rows, float* out) {
  const auto* x = static_cast<const float*>(p.a.data) + row * p.a.row_stride;
  for (Int i = 0; i < rows; ++i, x += p.a.row_stride) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (Int k = 0; k < p.k; k += 32) {
      const __m512 low = load(x + k, first(p.k - k));
      const __m512 high = p.k - k > 16 ? load(x + k + 16, first(p.k - k - 16)) : odd;
      even = _mm512_fmadd_ps(low, low, even);
      if (p.k - k > 16) odd = _mm512_fmadd_ps(high, high, odd);
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / static_cast<float>(p.k);
    out[i] = 1.0f / std::sqrt(mean + p.epsilon);
  }
}

}  // namespace
}  // namespace airl_fast
