// Attention mass: all scores of a few rows first, then their softmax. Far from the fast kernel, which never holds a
// row's weights as a whole, but its parts: rotation, packing of pages, tiles of dot products.
#include "kernels/attention_mass.h"

#include <limits>
#include <vector>

#include "kernels/cpu/attention_kernel.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/page_rows.h"
#include "kernels/cpu/rope_angle.h"
#include "libkvshare/core/check.h"

namespace kvshare::kernels {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;
// Bounds the scores held at a time: 32 rows of 4 heads over 32768 keys are 16 MiB.
constexpr std::size_t kRowsAtATime = 32;

std::size_t Index(std::int64_t i) { return static_cast<std::size_t>(i); }

// A page of a segment that some row sees, and where its keys stand among the columns of the scores.
struct Column {
  std::size_t segment;
  std::int64_t page;  // of the segment
  std::uint64_t keep;
};

class MassCall {
 public:
  MassCall(const AttentionParams& p, std::span<const std::int64_t> rows, std::span<const std::span<float>> mass,
           const AttentionKernel& kernel)
      : p_(p),
        rows_(rows),
        mass_(mass),
        kernel_(kernel),
        d_(p.pages.layout.head_dim),
        group_(p.num_heads / p.pages.layout.num_kv_heads) {
    for (const std::int64_t row : rows) {
      const std::int64_t position = p.positions[Index(row)];
      for (std::size_t s = 0; s < p.segments.size(); ++s) {
        const KvSegment& segment = p.segments[s];
        const bool sees = segment.row_begin <= row && row < segment.row_end;
        seen_.push_back(sees ? SeenBy(segment, position, p.window) : PageRows{0, 0});
      }
    }
    for (std::size_t s = 0; s < p.segments.size(); ++s) AddColumns(s);
    query_.resize(rows.size() * Index(group_) * RowBytes());
    keys_.resize(RowBytes() * kPageTokens);
    scores_.resize(rows.size() * Index(group_) * Stride());
    total_.assign(Stride(), 0.0f);
  }

  void Run() {
    for (int head = 0; head < p_.pages.layout.num_kv_heads; ++head) RunHead(head);
    if (kernel_.release != nullptr) kernel_.release();
    for (std::size_t c = 0; c < columns_.size(); ++c) {
      const KvSegment& s = p_.segments[columns_[c].segment];
      const std::span<float> mass = mass_[columns_[c].segment];
      const std::int64_t first = columns_[c].page * kPageTokens - s.first;  // token of the page's row 0
      for (std::int64_t r = 0; !mass.empty() && r < kPageTokens; ++r) {
        if (first + r >= 0 && first + r < s.length) mass[Index(first + r)] += total_[c * kPageTokens + Index(r)];
      }
    }
  }

 private:
  std::size_t RowBytes() const { return Index(d_) * kernel_.element_bytes; }
  std::size_t Stride() const { return columns_.size() * kPageTokens; }
  const PageRows& Seen(std::size_t row, std::size_t segment) const { return seen_[row * p_.segments.size() + segment]; }

  void AddColumns(std::size_t s) {
    PageRows all{std::numeric_limits<std::int64_t>::max(), 0};
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      const PageRows& seen = Seen(r, s);
      if (seen.begin >= seen.end) continue;
      all.begin = std::min(all.begin, seen.begin);
      all.end = std::max(all.end, seen.end);
    }
    for (std::int64_t page = all.begin / kPageTokens; page * kPageTokens < all.end; ++page) {
      columns_.push_back({s, page, KeptRows(p_.segments[s], page)});
    }
  }

  void RunHead(int head) {
    std::size_t rotated = p_.segments.size();  // none
    for (std::size_t c = 0; c < columns_.size(); ++c) {
      const Column& column = columns_[c];
      const KvSegment& s = p_.segments[column.segment];
      if (rotated != column.segment) Rotate(column.segment, head);
      rotated = column.segment;
      const PageIndex page = s.pages[Index(column.page)];
      KVS_CHECK(page < p_.pages.num_pages);
      kernel_.pack_keys(p_.pages.slab(page, p_.layer, 0, head), d_, keys_.data());
      float* scores = scores_.data() + c * kPageTokens;
      const int rows = static_cast<int>(rows_.size()) * group_;
      kernel_.scores(query_.data(), rows, d_, keys_.data(), scores, static_cast<std::int64_t>(Stride()));
      for (std::size_t r = 0; r < rows_.size(); ++r) {
        const std::uint64_t mask = column.keep & SeenMask(Seen(r, column.segment), column.page * kPageTokens);
        if (mask == ~std::uint64_t{0}) continue;
        for (int g = 0; g < group_; ++g) {
          float* row = scores + (r * Index(group_) + Index(g)) * Stride();
          for (int t = 0; t < kPageTokens; ++t) {
            if (((mask >> t) & 1) == 0) row[t] = kNone;
          }
        }
      }
    }
    for (std::size_t r = 0; r < rows_.size() * Index(group_); ++r) {
      kernel_.add_mass(scores_.data() + r * Stride(), static_cast<std::int64_t>(Stride()), total_.data());
    }
  }

  void Rotate(std::size_t segment, int head) {
    std::byte* q = query_.data();
    RopeAngle angle(p_.rope);
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      const PageRows& seen = Seen(r, segment);
      angle.Set(seen.begin < seen.end ? p_.positions[Index(rows_[r])] - p_.segments[segment].shift : 0);
      const float* heads = p_.q.row<float>(rows_[r]) + head * group_ * d_;
      for (int g = 0; g < group_; ++g, q += RowBytes()) {
        kernel_.rotate(heads + g * d_, angle.cos(), angle.sin(), p_.rope.half, d_, p_.scale * kLog2E, q);
      }
    }
  }

  const AttentionParams& p_;
  const std::span<const std::int64_t> rows_;
  const std::span<const std::span<float>> mass_;
  const AttentionKernel& kernel_;
  const int d_;
  const int group_;
  std::vector<PageRows> seen_;  // [row][segment]
  std::vector<Column> columns_;
  std::vector<std::byte> query_;  // [row][head of the group][d], elements as the kernel has them
  std::vector<std::byte> keys_;   // one packed page
  std::vector<float> scores_;     // [row][head of the group][column][64]
  std::vector<float> total_;      // [column][64]
};

}  // namespace

void AttentionMass(const AttentionParams& p, std::span<const std::int64_t> rows, std::span<const std::span<float>> mass,
                   CpuIsa isa) {
  KVS_CHECK(mass.size() == p.segments.size() && p.q.dtype == DType::kF32);
  for (std::size_t s = 0; s < mass.size(); ++s) {
    const KvSegment& segment = p.segments[s];
    KVS_CHECK(mass[s].empty() || static_cast<std::int64_t>(mass[s].size()) == segment.length);
    KVS_CHECK(segment.first + segment.length <= static_cast<std::int64_t>(segment.pages.size()) * kPageTokens);
  }
  if (isa == CpuIsa::kAuto) isa = AvailableIsas().front();
  const AttentionKernel& kernel = AttentionKernelFor(isa, p.pages.layout);
  for (std::size_t begin = 0; begin < rows.size(); begin += kRowsAtATime) {
    MassCall(p, rows.subspan(begin, std::min(kRowsAtATime, rows.size() - begin)), mass, kernel).Run();
  }
}

}  // namespace kvshare::kernels
