// The selective forward beside the plain one, on a real model: as many rows, looking at as many keys on average, once
// side by side and once scattered over chunks that stand elsewhere. Usage: selective_bench MODEL [ROUNDS].
//
//   contiguous     the middle 15 % of a context of 2,048 tokens, over its stored beginning
//   scattered      15 % of its rows at random, over four moved chunks of 512 tokens, skipped there, in private pages
//   suffix, hit    64 new rows after the context as it was stored: an exact hit
//   suffix, moved  64 new rows after the same tokens as four moved chunks that begin within their pages
//
// One thread, processor time, all four in turn in every round, because the machine's speed drifts; the best of the
// rounds counts, and beside it the median of the rounds' ratios.
#include <malloc.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "runtime/model.h"

namespace kvshare::runtime {
namespace {

using kernels::kPageTokens;
using kernels::KvSegment;
using kernels::KvSlot;
using kernels::PageIndex;

constexpr std::int64_t kContext = 2048, kChunk = 512, kSuffix = 64, kShare = 15;

class Bench {
 public:
  explicit Bench(Model* model) : model_(*model) {
    const kernels::KvLayout layout = model->kv_layout();
    auto memory = model->backend().Allocate(kPages * layout.page_bytes());
    if (!memory.ok()) std::exit(2);
    memory_ = std::move(*memory);
    pages_ = {memory_->data(), kPages, layout};
    std::mt19937_64 random(1);
    for (std::int64_t t = 0; t < kContext + kSuffix; ++t) {
      ids_.push_back(static_cast<TokenId>(random() % static_cast<std::uint64_t>(model->config().vocab_size)));
    }
    context_ = Take(kContext + kSuffix);
    for (std::int64_t c = 0; c < kContext / kChunk; ++c) chunks_.push_back(Take(kChunk + kFirst));
    for (std::int64_t p = 0; p < kContext; ++p) {
      if (static_cast<std::int64_t>(random() % 100) < kShare) scattered_.push_back(p);
    }
    for (std::int64_t p = 0; p < static_cast<std::int64_t>(scattered_.size()); ++p) {
      contiguous_.push_back((kContext - static_cast<std::int64_t>(scattered_.size())) / 2 + p);
    }
    for (std::int64_t p = kContext; p < kContext + kSuffix; ++p) suffix_.push_back(p);
    private_ = Take(static_cast<std::int64_t>(scattered_.size()));
    suffix_pages_ = Take(kSuffix);
    for (std::int64_t c = 0; c < kContext / kChunk; ++c) {
      skips_.emplace_back(chunks_[static_cast<std::size_t>(c)].size(), 0);
    }
    for (const std::int64_t p : scattered_) {
      const std::int64_t row = p % kChunk + kFirst;
      skips_[static_cast<std::size_t>(p / kChunk)][static_cast<std::size_t>(row / kPageTokens)] |=
          std::uint64_t{1} << (row % kPageTokens);
    }
    Fill();
  }

  std::int64_t selected() const { return static_cast<std::int64_t>(scattered_.size()); }

  void Contiguous() { Run(Batch(contiguous_, context_, contiguous_[0], {Whole(contiguous_.back() + 1)})); }
  void Scattered() {
    std::vector<KvSegment> segments = Moved(true);
    segments.push_back({.pages = private_, .length = selected(), .positions = scattered_});
    Run(Batch(scattered_, private_, 0, segments));
  }
  void SuffixHit() { Run(Batch(suffix_, context_, kContext, {Whole(kContext + kSuffix)})); }
  void SuffixMoved() {
    std::vector<KvSegment> segments = Moved(false);
    segments.push_back({.pages = suffix_pages_, .start = kContext, .length = kSuffix});
    Run(Batch(suffix_, suffix_pages_, 0, segments));
  }

 private:
  static constexpr PageIndex kPages = 128;
  static constexpr int kFirst = 23;  // page row at which a chunk begins

  std::vector<PageIndex> Take(std::int64_t rows) {
    std::vector<PageIndex> pages;
    for (std::int64_t row = 0; row < rows; row += kPageTokens) pages.push_back(taken_++);
    return pages;
  }
  KvSegment Whole(std::int64_t length) const { return {.pages = context_, .start = 0, .length = length}; }
  // Each chunk was computed 100 positions before it stands here, the first after.
  std::vector<KvSegment> Moved(bool skip) const {
    std::vector<KvSegment> segments;
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      const std::int64_t start = static_cast<std::int64_t>(c) * kChunk;
      segments.push_back({.pages = chunks_[c],
                          .start = start,
                          .length = kChunk,
                          .shift = c == 0 ? -100 : 100,
                          .skip = skip ? std::span<const std::uint64_t>(skips_[c]) : std::span<const std::uint64_t>(),
                          .first = kFirst});
    }
    return segments;
  }

  // Rows at `positions`, stored side by side in `pages` from page row `row` on; the last one's logits.
  ForwardBatch Batch(const std::vector<std::int64_t>& positions, const std::vector<PageIndex>& pages, std::int64_t row,
                     std::vector<KvSegment> segments) const {
    ForwardBatch batch;
    batch.positions = positions;
    for (const std::int64_t p : positions) {
      batch.ids.push_back(ids_[static_cast<std::size_t>(p)]);
      batch.slots.push_back({pages[static_cast<std::size_t>(row / kPageTokens)], static_cast<int>(row % kPageTokens)});
      ++row;
    }
    batch.logit_rows = {static_cast<std::int64_t>(positions.size()) - 1};
    for (KvSegment& s : segments) s.row_end = static_cast<std::int64_t>(positions.size());
    batch.segments = std::move(segments);
    return batch;
  }

  // Computes the context, and every chunk alone where it was "made".
  void Fill() {
    const auto fill = [&](std::int64_t begin, std::int64_t count, std::int64_t base, int first,
                          const std::vector<PageIndex>& pages) {
      for (std::int64_t done = 0; done < count; done += kChunk) {
        const std::int64_t rows = std::min(kChunk, count - done);
        ForwardBatch batch;
        for (std::int64_t t = done; t < done + rows; ++t) {
          batch.ids.push_back(ids_[static_cast<std::size_t>(begin + t)]);
          batch.positions.push_back(base + t);
          const std::int64_t row = first + t;
          batch.slots.push_back(
              {pages[static_cast<std::size_t>(row / kPageTokens)], static_cast<int>(row % kPageTokens)});
        }
        batch.segments = {
            {.pages = pages, .start = base, .length = done + rows, .row_begin = 0, .row_end = rows, .first = first}};
        Run(batch);
      }
    };
    fill(0, kContext, 0, 0, context_);
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      const std::int64_t start = static_cast<std::int64_t>(c) * kChunk;
      fill(start, kChunk, start - (c == 0 ? -100 : 100), kFirst, chunks_[c]);
    }
  }

  void Run(const ForwardBatch& batch) {
    logits_.resize(batch.logit_rows.size() * static_cast<std::size_t>(model_.config().vocab_size));
    if (!model_.Forward(batch, pages_, logits_.data()).ok()) std::exit(2);
  }

  Model& model_;
  std::unique_ptr<kernels::Buffer> memory_;
  kernels::KvPages pages_;
  PageIndex taken_ = 0;
  std::vector<TokenId> ids_;
  std::vector<PageIndex> context_, private_, suffix_pages_;
  std::vector<std::vector<PageIndex>> chunks_;
  std::vector<std::vector<std::uint64_t>> skips_;
  std::vector<std::int64_t> scattered_, contiguous_, suffix_;
  std::vector<float> logits_;
};

// Of the process: other people's work on the machine does not count, as far as it leaves the caches alone.
double Seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

int Main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: selective_bench MODEL [ROUNDS]\n");
    return 1;
  }
  const int rounds = argc == 3 ? std::max(1, std::atoi(argv[2])) : 30;
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // as agentd has it: buffers of a step are not faulted in each time
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
  auto model = LoadModel(argv[1], {.threads = 1});
  if (!model.ok()) {
    std::fprintf(stderr, "selective_bench: %s\n", model.status().message().c_str());
    return 1;
  }
  Bench bench(model->get());
  struct Case {
    const char* name;
    void (Bench::*run)();
    std::int64_t rows;
    std::vector<double> seconds;
  };
  std::array<Case, 4> cases = {{{"contiguous", &Bench::Contiguous, bench.selected(), {}},
                                {"scattered", &Bench::Scattered, bench.selected(), {}},
                                {"suffix, hit", &Bench::SuffixHit, kSuffix, {}},
                                {"suffix, moved", &Bench::SuffixMoved, kSuffix, {}}}};
  for (int round = 0; round < rounds; ++round) {
    for (Case& c : cases) {
      const double start = Seconds();
      (bench.*c.run)();
      c.seconds.push_back(Seconds() - start);
    }
  }
  std::printf("%-14s %5s %9s %8s %17s %17s\n", "case", "rows", "best ms", "rows/s", "speed, best", "median of ratios");
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const Case &c = cases[i], &reference = cases[i / 2 * 2];
    std::vector<double> ratios;
    for (std::size_t r = 0; r < c.seconds.size(); ++r) ratios.push_back(reference.seconds[r] / c.seconds[r]);
    std::sort(ratios.begin(), ratios.end());
    const double best = *std::min_element(c.seconds.begin(), c.seconds.end());
    const double other = *std::min_element(reference.seconds.begin(), reference.seconds.end());
    std::printf("%-14s %5lld %9.2f %8.0f %16.3fx %16.3fx\n", c.name, static_cast<long long>(c.rows), best * 1e3,
                static_cast<double>(c.rows) / best, other / best, ratios[ratios.size() / 2]);
  }
  return 0;
}

}  // namespace
}  // namespace kvshare::runtime

int main(int argc, char** argv) { return kvshare::runtime::Main(argc, argv); }
