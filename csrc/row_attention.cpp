#include "row_attention.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "rows_kernels.h"

namespace airl_fast {
namespace {

// Puts a new key and value of a row's head after the others.
void extend(const RowSizes& sizes, const float* key, const float* value, float* own_keys,
            float* own_values) {
  const std::int64_t place = sizes.own - 1;
  for (std::int64_t e = 0; e < sizes.size; ++e) own_keys[e * sizes.room + place] = key[e];
  std::copy_n(value, sizes.size, own_values + place * sizes.size);
}

}  // namespace

void attend_rows(const RowSizes& sizes, const RowKeys& held, const float* queries,
                 const float* keys, const float* values, float scale, float* out, int threads) {
  const auto kernel = row_kernels().attend_query;
  const std::int64_t size = sizes.size, group = sizes.heads / sizes.key_heads;
  // Rows of a piece read the same head of their prompts, one after the other.
  const std::int64_t work = size * group * (sizes.own + sizes.tokens / (sizes.rows + 1) + 1);
  const std::int64_t all = sizes.rows * sizes.key_heads;
  share(all, 1 + 65536 / work, threads, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scores;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t head = i / sizes.rows, row = i % sizes.rows;
      const std::int64_t at = row * sizes.key_heads + head;
      float* own_keys = held.own_keys + at * size * sizes.room;
      float* own_values = held.own_values + at * size * sizes.room;
      extend(sizes, keys + at * size, values + at * size, own_keys, own_values);

      const std::int64_t count = held.counts[row];
      const std::int64_t hidden = std::max<std::int64_t>(0, count + sizes.own - sizes.window);
      const std::int64_t first = std::min(hidden, count), own = hidden - first;
      const std::int64_t token = held.starts[row] + first;
      const KeyPart parts[2] = {
          {held.prompt_keys + head * size * sizes.tokens + token, sizes.tokens,
           held.prompt_values + (head * sizes.tokens + token) * size, count - first},
          {own_keys + own, sizes.room, own_values + own * size, sizes.own - own}};
      scores.resize(static_cast<std::size_t>(parts[0].count + parts[1].count));
      for (std::int64_t g = 0; g < group; ++g) {
        const std::int64_t query = (row * sizes.heads + head * group + g) * size;
        kernel(size, queries + query, parts, scale, scores.data(), out + query);
      }
    }
  });
}

}  // namespace airl_fast
