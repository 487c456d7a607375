// The arithmetic that CUDA kernels and their plan share, against that of the CPU backend: pages, masks, angles; and
// that a plan's blocks do every row's work once.
#include "kernels/cuda/attention_plan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "kernels/cpu/page_rows.h"
#include "kernels/cpu/rope_angle.h"

namespace kvshare::kernels::cuda {
namespace {

struct Tables {
  std::vector<PageIndex> pages;
  std::vector<std::uint64_t> skip;
  std::vector<std::int64_t> positions;
};

KvSegment MakeSegment(std::mt19937_64& random, Tables& t) {
  const auto uniform = [&random](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  KvSegment s;
  s.start = uniform(0, 200);
  s.length = uniform(0, 3000);
  s.shift = uniform(-100, s.start);
  s.first = static_cast<int>(uniform(0, 63));
  t.pages.assign(static_cast<std::size_t>((s.first + s.length + 63) / 64), 0);
  s.pages = t.pages;
  if (uniform(0, 1) == 0) {
    for (std::size_t i = 0; i < t.pages.size(); ++i) t.skip.push_back(random() & random());
    s.skip = t.skip;
  }
  if (uniform(0, 1) == 0) {
    std::int64_t at = uniform(0, 50);
    for (std::int64_t i = 0; i < s.length; ++i, at += uniform(1, 3)) t.positions.push_back(at);
    s.positions = t.positions;
    s.shift = 0;
  }
  return s;
}

SegmentView ViewWithTables(const KvSegment& s) {
  SegmentView v;
  v.start = s.start;
  v.length = s.length;
  v.first = s.first;
  v.skip = s.skip.empty() ? nullptr : s.skip.data();
  v.positions = s.positions.empty() ? nullptr : s.positions.data();
  return v;
}

TEST(CudaArithmeticTest, PagesAndMasksAreThoseOfTheCpu) {
  std::mt19937_64 random(1);
  for (int trial = 0; trial < 300; ++trial) {
    Tables tables;
    const KvSegment s = MakeSegment(random, tables);
    const SegmentView v = ViewWithTables(s);
    for (std::size_t page = 0; page < s.pages.size(); ++page) {
      ASSERT_EQ(KeptMask(v, static_cast<std::int64_t>(page)), KeptRows(s, static_cast<std::int64_t>(page)));
    }
    for (int i = 0; i < 40; ++i) {
      const auto position = static_cast<std::int64_t>(random() % 4000);
      const auto window = static_cast<std::int64_t>(i % 3 == 0 ? 1 + random() % 500 : 0);
      const PageRows want = SeenBy(s, position, window);
      const RowRange got = SeenRows(v, position, window);
      ASSERT_EQ(got.begin, want.begin);
      ASSERT_EQ(got.end, want.end);
      for (std::int64_t first = 0; first < s.first + s.length; first += 64) {
        ASSERT_EQ(RangeMask(got, first), SeenMask(want, first));
      }
    }
  }
}

TEST(CudaArithmeticTest, AnglesAreThoseOfTheCpu) {
  constexpr std::int64_t kPositions = 50;
  constexpr int kHalf = 8;
  std::vector<float> cos, sin;
  for (std::int64_t p = 0; p < kPositions; ++p) {
    for (int j = 0; j < kHalf; ++j) {
      const double angle = static_cast<double>(p) * std::pow(10.0, -double(j) / kHalf);
      cos.push_back(static_cast<float>(1.1 * std::cos(angle)));  // with a factor, as yarn has
      sin.push_back(static_cast<float>(1.1 * std::sin(angle)));
    }
  }
  const RopeTable table{cos, sin, kPositions, kHalf};
  RopeAngle want(table);
  for (std::int64_t angle = 0; angle <= 2 * (kPositions - 1); ++angle) {
    want.Set(angle);
    for (int j = 0; j < kHalf; ++j) {
      const CosSin got = AngleAt({cos.data(), sin.data(), kPositions, kHalf}, angle, j);
      ASSERT_EQ(got.cos, want.cos()[j]);
      ASSERT_EQ(got.sin, want.sin()[j]);
    }
  }
}

TEST(AttentionPlanTest, EveryRowsWorkIsDoneOnce) {
  std::mt19937_64 random(2);
  for (int trial = 0; trial < 200; ++trial) {
    const int heads = 1 + static_cast<int>(random() % 5), kv_heads = 2;  // query heads of each kv head
    const auto rows = static_cast<std::int64_t>(1 + random() % 200);
    std::vector<std::int64_t> positions;
    for (std::int64_t i = 0; i < rows; ++i) positions.push_back(static_cast<std::int64_t>(random() % 3000));
    std::vector<Tables> tables(3);
    std::vector<KvSegment> segments;
    for (Tables& t : tables) {
      KvSegment s = MakeSegment(random, t);
      s.shift = 0;
      s.row_begin = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(rows));
      s.row_end =
          s.row_begin + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(rows - s.row_begin + 1));
      segments.push_back(s);
    }
    const std::int64_t window = trial % 3 == 0 ? 200 : 0;
    AttentionParams p;
    p.q.rows = p.out.rows = rows;
    p.num_heads = heads * kv_heads;
    p.window = window;
    p.positions = positions;
    p.segments = segments;
    p.pages = {nullptr, 1, {1, kv_heads, 64, DType::kBf16}};
    for (const bool spread : {false, true}) {
      const AttentionPlan plan = PlanAttention(p, {.spread_bytes = spread ? std::int64_t{1} << 50 : -1});
      if (plan.partials == 0 && !spread) continue;  // nobody sees anything: either way is no work
      ASSERT_EQ(plan.spread, spread);
      std::map<std::tuple<std::int64_t, int, std::int64_t>, int> done;  // packed row, segment, split
      std::map<std::int64_t, int> walked;
      std::set<std::int64_t> partials;
      for (const WorkItem& item : plan.items) {
        ASSERT_TRUE(item.rows >= 1 && item.rows <= kTileRows && (item.split >= 0) == spread);
        for (int r = 0; r < item.rows; ++r) {
          const std::int64_t packed = item.packed_begin + r;
          ++walked[packed];
          for (int n = item.segment_begin; n < item.segment_end; ++n) {
            const SegmentView& s = plan.segments[static_cast<std::size_t>(n)];
            if (!Covers(s, heads, item)) continue;
            if (spread) {
              ++done[{packed, n, item.split}];
              for (int h = 0; h < kv_heads; ++h) {
                const std::int64_t index = PartialIndex(s, heads, kv_heads, item.split, h, packed);
                ASSERT_TRUE(index >= 0 && index < plan.partials);
                ASSERT_TRUE(partials.insert(index).second) << "two partials at " << index;
              }
            } else {
              ++done[{packed, n, -1}];
            }
          }
        }
      }
      for (std::int64_t packed = 0; packed < rows * heads; ++packed) {
        if (!spread) {
          ASSERT_EQ(walked[packed], 1);
        }
        for (int n = 0; n < 3; ++n) {
          const KvSegment& s = segments[static_cast<std::size_t>(n)];
          const std::int64_t row = packed / heads;
          if (row < s.row_begin || row >= s.row_end) continue;
          const RowRange seen = SeenRows(ViewWithTables(s), positions[static_cast<std::size_t>(row)], window);
          if (seen.end <= seen.begin) continue;
          if (!spread) {
            ASSERT_EQ((done[{packed, n, -1}]), 1);
          }
          for (std::int64_t u = seen.begin / kSplitRows; spread && u * kSplitRows < seen.end; ++u) {
            ASSERT_EQ((done[{packed, n, u}]), 1);
          }
        }
      }
    }
  }
}

TEST(AttentionPlanTest, ManyPartialsAreWalkedInstead) {
  std::vector<std::int64_t> positions(2048, 4000);
  std::vector<PageIndex> pages(64);
  const KvSegment s{.pages = pages, .length = 4096, .row_end = 2048};
  AttentionParams p;
  p.q.rows = p.out.rows = 2048;
  p.num_heads = 8;
  p.positions = positions;
  p.segments = {&s, 1};
  p.pages = {nullptr, 1, {1, 2, 128, DType::kBf16}};
  // 4 splits x 8 heads x 2048 rows of 520 bytes: 34 MB.
  EXPECT_TRUE(PlanAttention(p, {.spread_bytes = 40 << 20}).spread);
  EXPECT_FALSE(PlanAttention(p, {.spread_bytes = 30 << 20}).spread);
}

}  // namespace
}  // namespace kvshare::kernels::cuda
