// Which tokens of a segment a row sees by position: always a range, because positions ascend.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/paged_kv.h"

namespace kvshare::kernels {

// Tokens of a segment by their page rows: token t is page row first + t, counted from row 0 of the first page. Splits
// and tiles are cut at multiples of these, so that a tile is one page wherever in it a segment begins.
struct PageRows {
  std::int64_t begin;
  std::int64_t end;
};

// The tokens of `s` that a row at `position` sees by position and window; the skip masks come on top.
inline PageRows SeenBy(const KvSegment& s, std::int64_t position, std::int64_t window) {
  PageRows seen{0, 0};
  if (s.positions.empty()) {
    seen.end = position - s.start + 1;
    if (window > 0) seen.begin = position - window + 1 - s.start;
  } else {
    const auto after = [&s](std::int64_t p) {
      return std::upper_bound(s.positions.begin(), s.positions.end(), p) - s.positions.begin();
    };
    seen.end = after(position);
    if (window > 0) seen.begin = after(position - window);
  }
  seen.begin = std::clamp<std::int64_t>(seen.begin, 0, s.length) + s.first;
  seen.end = std::clamp<std::int64_t>(seen.end, 0, s.length) + s.first;
  return seen;
}

// The rows of page number `page` of a segment that hold tokens of it which are not skipped.
inline std::uint64_t KeptRows(const KvSegment& s, std::int64_t page) {
  std::uint64_t keep = ~std::uint64_t{0};
  const std::int64_t tokens = s.first + s.length - page * kPageTokens;
  if (tokens < kPageTokens) keep >>= kPageTokens - tokens;
  if (page == 0) keep = keep >> s.first << s.first;
  if (!s.skip.empty()) keep &= ~s.skip[static_cast<std::size_t>(page)];
  return keep;
}

// Those of the rows [0, 64) from page row `first` on that lie in `seen`.
inline std::uint64_t SeenMask(const PageRows& seen, std::int64_t first) {
  std::uint64_t mask = ~std::uint64_t{0};
  const std::int64_t end = seen.end - first;
  if (end < kPageTokens) mask = end <= 0 ? 0 : mask & ((std::uint64_t{1} << end) - 1);
  const std::int64_t begin = seen.begin - first;
  if (begin > 0) mask = begin >= kPageTokens ? 0 : mask >> begin << begin;
  return mask;
}

}  // namespace kvshare::kernels
