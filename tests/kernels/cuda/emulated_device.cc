#include "tests/kernels/cuda/emulated_device.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>

#include "kernels/cuda/anchor_block.h"
#include "kernels/cuda/attention_block.h"
#include "kernels/cuda/mass_block.h"
#include "kernels/cuda/merge_block.h"
#include "kernels/cuda/movers_block.h"
#include "kernels/cuda/row_ops_block.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels::cuda {
namespace {

GridStats g_stats;

class EmulatedDevice final : public Device {
 public:
  explicit EmulatedDevice(const EmulatedDeviceOptions& options)
      : options_(options), seed_(options.seed), random_(options.seed) {
    facts_ = {.name = "emulated",
              .arch = "emulated",
              .linear = "loops",
              .memory_bytes = options.memory_bytes,
              .multiprocessors = 2};
  }
  ~EmulatedDevice() override {
    for (const auto& [data, bytes] : blocks_) std::free(data);
  }
  const DeviceFacts& facts() const override { return facts_; }

  Result<std::byte*> Allocate(std::size_t bytes) override {
    if (used_ + bytes > options_.memory_bytes) return ResourceExhausted("the emulated GPU is full");
    used_ += bytes;
    return Block(bytes);
  }
  void Free(std::byte* data) override {
    RunAll();  // as cudaFree waits
    RunAllAside();
    used_ -= blocks_.at(data);
    Release(data);
  }
  Result<std::byte*> AllocatePinned(std::size_t bytes) override { return Block(bytes); }
  void FreePinned(std::byte* data) override {
    RunAll();
    RunAllAside();
    Release(data);
  }

  Status Fill(std::byte* to, int value, std::size_t bytes) override {
    return Enqueue([=] { std::memset(to, value, bytes); });
  }
  // Reads `from` when it runs: it must still hold what it held.
  Status CopyIn(std::byte* to, const void* from, std::size_t bytes) override {
    return Enqueue([=] { std::memcpy(to, from, bytes); });
  }
  Status CopyOut(void* to, const std::byte* from, std::size_t bytes) override {
    return Enqueue([=] { std::memcpy(to, from, bytes); });
  }
  Status Mark(int mark) override {
    marks_[mark] = enqueued_;
    return OkStatus();
  }
  Status Wait(int mark) override {
    while (ran_ < marks_[mark]) RunOne();
    return failed_;
  }
  Status Synchronize() override {
    RunAll();
    return failed_;
  }

  Status AsideFollows() override {
    return EnqueueAside([this, until = enqueued_] {
      while (ran_ < until) RunOne();
    });
  }
  Status CopyInAside(std::byte* to, const std::byte* pinned, std::size_t bytes) override {
    return EnqueueAside([=] { std::memcpy(to, pinned, bytes); });
  }
  Status CopyOutAside(std::byte* pinned, const std::byte* from, std::size_t bytes) override {
    return EnqueueAside([=] { std::memcpy(pinned, from, bytes); });
  }
  Status MarkAside(int mark) override {
    aside_marks_[mark] = aside_enqueued_;
    return failed_;
  }
  Status FollowAside(int mark) override {
    return Enqueue([this, until = aside_marks_.at(mark)] { RunAsideUntil(until); });
  }
  Result<bool> PassedAside(int mark) override {
    if (!failed_.ok()) return failed_;
    if (aside_ran_ < aside_marks_.at(mark)) {
      RunAsideUntil(aside_ran_ + 1);  // who asks often enough sees it end
      return false;
    }
    return true;
  }
  Status WaitAside(int mark) override {
    RunAsideUntil(aside_marks_.at(mark));
    return failed_;
  }

  Status Attention(const AttentionArgs& args, int head_dim, int items, bool spread) override {
    return ForHeads(head_dim, args.pages.dtype,
                    [&]<int kHeadDim, DType kHalf>() { return AttentionOf<kHeadDim, kHalf>(args, items, spread); });
  }
  Status Merge(const AttentionArgs& args, int head_dim, std::int64_t packed_rows) override {
    const int blocks = static_cast<int>((packed_rows + kMergeThreads / 32 - 1) / (kMergeThreads / 32));
    return Launch({blocks, args.pages.kv_heads, kMergeThreads, 0}, [=](EmulatedLane& lane) {
      if (head_dim == 64) {
        MergeBlock<EmulatedLane, 64>(args, packed_rows, lane);
      } else {
        MergeBlock<EmulatedLane, 128>(args, packed_rows, lane);
      }
    });
  }
  Status Embed(const EmbedArgs& args) override {
    return Rows(args.rows, [=](EmulatedLane& lane) { EmbedBlock(args, lane); });
  }
  Status RmsNorm(const RmsNormArgs& args) override {
    return Rows(args.rows, [=](EmulatedLane& lane) { RmsNormBlock(args, lane); });
  }
  Status StoreKv(const StoreKvArgs& args) override {
    return Rows(args.rows, [=](EmulatedLane& lane) { StoreKvBlock(args, lane); });
  }
  Status SwiGlu(const SwiGluArgs& args) override {
    return Rows(args.rows, [=](EmulatedLane& lane) { SwiGluBlock(args, lane); });
  }
  Status AddBias(const AddBiasArgs& args) override {
    return Rows(args.rows, [=](EmulatedLane& lane) { AddBiasBlock(args, lane); });
  }
  Status CopyPageRows(const CopyPageRowsArgs& args) override {
    return Rows(args.slabs, [=](EmulatedLane& lane) { CopyPageRowsBlock(args, lane); });
  }
  Status CopyRows(const CopyRowsArgs& args) override {
    return Launch({static_cast<int>(args.rows), args.layers, kRowThreads, 0},
                  [=](EmulatedLane& lane) { CopyRowsBlock(args, lane); });
  }
  Status CopyPages(const CopyPagesArgs& args) override {
    const int pieces = static_cast<int>((args.page_bytes + kPieceBytes - 1) / kPieceBytes);
    return Launch({args.count, pieces, kRowThreads, 0}, [=](EmulatedLane& lane) { CopyPagesBlock(args, lane); });
  }
  Status CodePages(const CodePagesArgs& args) override {
    return Launch({args.count, args.slabs, kRowThreads, 0}, [=](EmulatedLane& lane) { CodePagesBlock(args, lane); });
  }
  Status Deviation(const DeviationArgs& args) override {
    return Launch({static_cast<int>(args.rows), 1, kRowThreads, kDeviationShared},
                  [=](EmulatedLane& lane) { DeviationBlock(args, lane); });
  }
  Status Mass(const MassArgs& args, int head_dim) override {
    return ForHeads(head_dim, args.attention.pages.dtype,
                    [&]<int kHeadDim, DType kHalf>() { return MassOf<kHeadDim, kHalf>(args); });
  }
  Status Score(const ScoreArgs& args) override {
    const int blocks = static_cast<int>((args.n + kRowThreads - 1) / kRowThreads);
    return Launch({blocks, 1, kRowThreads, 0}, [=](EmulatedLane& lane) { ScoreBlock(args, lane); });
  }
  Status Choose(const ChooseArgs& args) override {
    const int blocks = static_cast<int>((args.n + kRowThreads - 1) / kRowThreads);
    KVS_RETURN_IF_ERROR(Launch({blocks, 1, kRowThreads, 0}, [=](EmulatedLane& lane) { RankBlock(args, lane); }));
    return Launch({blocks, 1, kRowThreads, 0}, [=](EmulatedLane& lane) { PlaceBlock(args, lane); });
  }

  Status AnchorDistances(const AnchorArgs& args) override {
    const int groups = (args.count + kAnchorsAtATime - 1) / kAnchorsAtATime;
    const bool f16 = args.dtype == DType::kF16;
    KVS_RETURN_IF_ERROR(Launch({static_cast<int>(2 * args.tokens), groups, kRowThreads, kAnchorDifferenceShared},
                               [=](EmulatedLane& lane) {
                                 if (f16) return AnchorDifferenceBlock<EmulatedLane, DType::kF16>(args, lane);
                                 AnchorDifferenceBlock<EmulatedLane, DType::kBf16>(args, lane);
                               }));
    return Rows(args.count, [=](EmulatedLane& lane) { AnchorDistanceBlock(args, lane); });
  }
  Status ApplyAnchors(const AnchorArgs& args) override {
    const int groups = (args.layers + kLayersAtATime - 1) / kLayersAtATime;
    const bool f16 = args.dtype == DType::kF16;
    return Launch({static_cast<int>(args.tokens), groups, kRowThreads, kAnchorWeightsShared}, [=](EmulatedLane& lane) {
      if (f16) return ApplyAnchorsBlock<EmulatedLane, DType::kF16>(args, lane);
      ApplyAnchorsBlock<EmulatedLane, DType::kBf16>(args, lane);
    });
  }

  Result<int> GemmCandidates(const GemmShape&) override { return options_.gemm_candidates; }
  std::uint64_t GemmIdentity(const GemmShape&, int algorithm) override {
    return (options_.gemm_family << 32) + static_cast<std::uint64_t>(algorithm);
  }
  Status Gemm(const GemmArgs& a, int algorithm) override {
    if (algorithm != kFastGemm && algorithm < options_.few_rows_from && a.rows < 8) return Unimplemented("few rows");
    const bool invariant = algorithm != kFastGemm && algorithm >= options_.invariant_from;
    return Enqueue(Counted([=] {
      const auto [n, k, dtype] = a.shape;
      for (std::int64_t r = 0; r < a.rows; ++r) {
        for (std::int64_t c = 0; c < n; ++c) {
          float sum = 0;
          // Begins elsewhere where rows are many: the same sum in another order.
          const std::int64_t begin = invariant || a.rows < 100 ? 0 : k / 2;
          for (std::int64_t i = 0; i < k; ++i) {
            const std::int64_t j = (begin + i) % k;
            sum += FromHalf(dtype, a.x[r * a.x_stride + j]) * FromHalf(dtype, a.w[c * k + j]);
          }
          float& out = a.out[r * a.out_stride + c];
          out = a.accumulate ? out + sum : sum;
        }
      }
    }));
  }

 private:
  using Work = std::function<void()>;

  Result<std::byte*> Block(std::size_t bytes) {
    auto* data = static_cast<std::byte*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    if (data == nullptr) return ResourceExhausted("no memory");
    std::memset(data, 0xff, bytes);
    blocks_[data] = bytes;
    return data;
  }
  void Release(std::byte* data) {
    std::memset(data, 0xff, blocks_.at(data));
    std::free(data);
    blocks_.erase(data);
  }

  Work Counted(Work work) {
    return [this, work = std::move(work), launch = launches_++] {
      const bool broken = options_.broken != nullptr && options_.broken();
      if (launch == options_.fail_at_launch || broken) failed_ = Internal("emulated GPU: an illegal address");
      if (failed_.ok()) work();
    };
  }
  Status Enqueue(Work work) {
    if (!failed_.ok()) return failed_;
    queue_.push_back(std::move(work));
    ++enqueued_;
    return OkStatus();
  }
  void RunOne() {
    const Work work = std::move(queue_.front());
    queue_.pop_front();
    ++ran_;
    if (failed_.ok()) work();
  }
  void RunAll() {
    while (!queue_.empty()) RunOne();
  }

  Status EnqueueAside(Work work) {
    if (!failed_.ok()) return failed_;
    aside_.push_back(std::move(work));
    ++aside_enqueued_;
    if (random_() % 2 == 0) RunAllAside();
    return OkStatus();
  }
  void RunAsideUntil(std::uint64_t count) {
    while (aside_ran_ < count) {
      const Work work = std::move(aside_.front());
      aside_.pop_front();
      ++aside_ran_;
      if (failed_.ok()) work();
    }
  }
  void RunAllAside() { RunAsideUntil(aside_enqueued_); }

  Status Launch(const Grid& grid, std::function<void(EmulatedLane&)> body) {
    return Enqueue(Counted([this, grid, body = std::move(body)] {
      const GridStats stats = Emulate(grid, ++seed_, body);
      g_stats.bank_conflicts += stats.bank_conflicts;
      g_stats.mma += stats.mma;
    }));
  }
  Status Rows(std::int64_t rows, std::function<void(EmulatedLane&)> body) {
    return Launch({static_cast<int>(rows), 1, kRowThreads, kRowShared}, std::move(body));
  }
  template <int kHeadDim, DType kHalf>
  Status AttentionOf(const AttentionArgs& args, int items, bool spread) {
    using Shared = AttentionShared<kHeadDim>;
    const std::size_t bytes = spread ? Shared::kSpreadBytes : Shared::kWalkBytes;
    return Launch({items, args.pages.kv_heads, kAttentionThreads, bytes},
                  [args](EmulatedLane& lane) { AttentionBlock<EmulatedLane, kHeadDim, kHalf>(args, lane).Run(); });
  }

  template <int kHeadDim, DType kHalf>
  Status MassOf(const MassArgs& args) {
    constexpr std::size_t kShared = MassShared<kHeadDim>::kBytes;
    const int heads = args.attention.pages.kv_heads;
    const int rows = static_cast<int>((args.packed_rows + kMergeThreads - 1) / kMergeThreads);
    KVS_RETURN_IF_ERROR(Launch({args.items, heads, kAttentionThreads, kShared}, [=](EmulatedLane& lane) {
      MassBlock<EmulatedLane, kHeadDim, kHalf, false>(args, lane).Run();
    }));
    KVS_RETURN_IF_ERROR(
        Launch({rows, heads, kMergeThreads, 0}, [=](EmulatedLane& lane) { MassTotalsBlock(args, lane); }));
    KVS_RETURN_IF_ERROR(Launch({args.asked_items, heads, kAttentionThreads, kShared}, [=](EmulatedLane& lane) {
      MassBlock<EmulatedLane, kHeadDim, kHalf, true>(args, lane).Run();
    }));
    return Launch({args.num_columns, 1, kMergeThreads, 0}, [=](EmulatedLane& lane) { MassSumBlock(args, lane); });
  }

  const EmulatedDeviceOptions options_;
  std::uint64_t seed_;
  DeviceFacts facts_;
  std::map<std::byte*, std::size_t> blocks_;
  std::size_t used_ = 0;
  std::deque<Work> queue_;
  std::uint64_t enqueued_ = 0, ran_ = 0;
  std::uint64_t marks_[kMarks] = {};
  std::deque<Work> aside_;
  std::uint64_t aside_enqueued_ = 0, aside_ran_ = 0;
  std::map<int, std::uint64_t> aside_marks_;
  std::mt19937_64 random_;
  int launches_ = 0;
  Status failed_;
};

}  // namespace

GridStats TakeGridStats() { return std::exchange(g_stats, {}); }

std::unique_ptr<Device> NewEmulatedDevice(const EmulatedDeviceOptions& options) {
  return std::make_unique<EmulatedDevice>(options);
}

}  // namespace kvshare::kernels::cuda
