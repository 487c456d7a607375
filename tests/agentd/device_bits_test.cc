// A whole model served by agentd on the CUDA backend: in the emulator always, on a GPU where there is one. Reuse, the
// disk and placing a chunk elsewhere change no answer, and what is stored has the bits of computing it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <future>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agentd/repair/moved_prompt.h"
#include "agentd/service.h"
#include "agentd/tiers/aligned_buffer.h"
#include "agentd/tiers/cold_tier.h"
#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"
#include "tests/kernels/cuda/backends.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::testing {
namespace {

using kernels::kPageTokens;
using kernels::PageIndex;
using kernels::cuda::Where;
using Ids = std::vector<TokenId>;
using Bytes = std::vector<std::byte>;

// Of rounding: keys are kept in bf16, and rotated once more.
constexpr double kTolerance = 3e-2;

class DeviceBitsTest : public ::testing::TestWithParam<Where> {
 protected:
  void SetUp() override {
    if (GetParam() == Where::kDevice && !kernels::ProbeCuda().ok()) {
      GTEST_SKIP() << "no GPU to test on: " << kernels::ProbeCuda().status().message();
    }
  }

  std::unique_ptr<runtime::Model> Load(int layers = 2) const {
    auto backend =
        GetParam() == Where::kDevice
            ? kernels::NewCudaBackend({})
            : kernels::cuda::NewBackendOn(kernels::cuda::NewEmulatedDevice(
                                              {.seed = seed_, .broken = [broken = broken_] { return broken->load(); }}),
                                          {});
    EXPECT_TRUE(backend.ok()) << backend.status().message();
    TinyModelOptions options;
    options.layers = layers;
    options.heads = 2;
    options.kv_heads = 1;
    options.head_dim = 64;
    options.max_positions = 256;
    const TempDir dir;
    EXPECT_TRUE(WriteTinyModel(dir.path(), options).ok());
    auto model = runtime::LoadModelOn(std::move(*backend), dir.path().string(), {.max_batch_rows = 128});
    EXPECT_TRUE(model.ok()) << model.status().message();
    return std::move(model).value();
  }

  // A context takes 4 pages.
  std::unique_ptr<agentd::Service> Serve(std::int64_t pool_pages, const std::string& cold_dir = "",
                                         int layers = 2) const {
    auto model = Load(layers);
    agentd::ServiceOptions options;
    options.kv_pool_bytes = pool_pages * static_cast<std::int64_t>(model->kv_layout().page_bytes());
    options.prefill_chunk_tokens = 64;
    options.cold_dir = cold_dir;
    options.cold_bytes = std::int64_t{64} << 20;
    options.always_load = true;
    auto service = agentd::NewService(std::move(model), options);
    EXPECT_TRUE(service.ok()) << service.status().message();
    return service.ok() ? std::move(*service) : nullptr;
  }

  void DiskChangesNoToken(const std::string& cold);

  Ids Random(int count) {
    Ids ids(static_cast<std::size_t>(count));
    for (TokenId& id : ids) id = static_cast<TokenId>(random_() % 256);
    return ids;
  }
  static Ids First(const Ids& ids, std::size_t count) { return {ids.begin(), ids.begin() + std::ptrdiff_t(count)}; }
  static GenerateRequest Request(const Ids& prompt, ReuseMode mode, int max_tokens = 4) {
    GenerateRequest request = IdsRequest(prompt, max_tokens, "agent");
    request.reuse = mode;
    request.ignore_eos = true;
    return request;
  }

  // Pages of `model` by their first token's position, as a directory's records have them.
  static std::map<std::int64_t, Bytes> Records(const runtime::Model& model, const std::string& directory) {
    std::map<std::int64_t, Bytes> records;
    agentd::ColdTierOptions options;
    options.directory = directory;
    options.max_bytes = std::int64_t{64} << 20;
    options.space = model.space();
    options.page_bytes = model.kv_layout().page_bytes();
    const auto tier = agentd::ColdTier::Open(options);
    EXPECT_TRUE(tier.ok()) << tier.status().message();
    if (!tier.ok()) return records;
    std::vector<agentd::ColdEntry> entries;
    (*tier)->ForEach(100, [&](const agentd::ColdEntry& entry) { entries.push_back(entry); });
    agentd::AlignedBuffer buffer((options.page_bytes + 4095) / 4096 * 4096);
    const auto page = buffer.bytes().first(options.page_bytes);
    for (const agentd::ColdEntry& entry : entries) {
      std::promise<std::vector<agentd::ColdLoaded>> done;
      (*tier)->Load({{.context = entry.page.context, .destination = page}},
                    [&](std::vector<agentd::ColdLoaded> loaded) { done.set_value(std::move(loaded)); });
      EXPECT_TRUE(done.get_future().get().front().status.ok());
      records[entry.page.start] = {page.begin(), page.end()};
    }
    return records;
  }

  const std::shared_ptr<std::atomic<bool>> broken_ = std::make_shared<std::atomic<bool>>(false);
  std::uint64_t seed_ = 1;  // of the emulated device: when it copies aside
  std::mt19937 random_{7};
  TempDir dir_;
};

// A model's own pages, for computing without the daemon.
class Bench {
 public:
  explicit Bench(runtime::Model* model) : model_(model) {
    auto memory = model->backend().Allocate(kPages * model->kv_layout().page_bytes());
    EXPECT_TRUE(memory.ok());
    memory_ = std::move(*memory);
    pages_ = {.base = memory_->data(), .num_pages = kPages, .layout = model->kv_layout()};
  }

  const kernels::KvPages& pages() const { return pages_; }
  std::vector<PageIndex> Take(std::int64_t count) {
    std::vector<PageIndex> taken;
    while (count-- > 0) taken.push_back(next_++);
    EXPECT_LE(next_, kPages);
    return taken;
  }
  // Whole, from nothing; the last row's logits.
  std::vector<float> Plain(const Ids& ids, std::vector<PageIndex>* where = nullptr) {
    const auto n = static_cast<std::int64_t>(ids.size());
    const std::vector<PageIndex> own = Take((n + kPageTokens - 1) / kPageTokens);
    runtime::ForwardBatch batch;
    batch.ids = ids;
    for (std::int64_t p = 0; p < n; ++p) {
      batch.positions.push_back(p);
      batch.slots.push_back({own[static_cast<std::size_t>(p / kPageTokens)], static_cast<int>(p % kPageTokens)});
    }
    batch.segments.push_back({.pages = own, .length = n, .row_end = n});
    batch.logit_rows.push_back(n - 1);
    std::vector<float> logits(static_cast<std::size_t>(model_->config().vocab_size));
    KVS_EXPECT_OK(model_->Forward(batch, pages_, logits.data()));
    if (where != nullptr) *where = own;
    return logits;
  }
  Bytes Page(PageIndex page) {
    Bytes bytes(pages_.layout.page_bytes());
    KVS_EXPECT_OK(model_->backend().Download(bytes.data(), pages_.slab(page, 0, 0, 0), bytes.size()));
    return bytes;
  }

 private:
  static constexpr PageIndex kPages = 64;
  runtime::Model* const model_;
  std::unique_ptr<kernels::Buffer> memory_;
  kernels::KvPages pages_;
  PageIndex next_ = 0;
};

TEST_P(DeviceBitsTest, ReuseChangesNoTokenAndNoStoredBit) {
  const Ids prompt = Random(135);
  const std::string off_dir = (dir_.path() / "off").string(), hit_dir = (dir_.path() / "hit").string();
  GenerateReply off, hit;
  {
    const auto service = Serve(12, off_dir);
    ASSERT_NE(service, nullptr);
    off = Ask(*service, Request(prompt, ReuseMode::kOff));
    EXPECT_EQ(Ask(*service, Request(prompt, ReuseMode::kExact)).ids, off.ids);  // from nothing; stored
    service->Drain();
  }
  {
    const auto service = Serve(12, hit_dir);
    ASSERT_NE(service, nullptr);
    Ask(*service, Request(First(prompt, 100), ReuseMode::kExact, 1));
    hit = Ask(*service, Request(prompt, ReuseMode::kExact));
    EXPECT_EQ(hit.reuse.prefix_tokens, 100);  // a page, and rows of the next
    EXPECT_EQ(hit.ids, off.ids);
    service->Drain();
    KVS_EXPECT_OK(service->CheckIntegrity());
  }
  const auto model = Load();
  Bench bench(model.get());
  std::vector<PageIndex> own;
  bench.Plain(First(prompt, 128), &own);
  auto from_nothing = Records(*model, off_dir), over_a_hit = Records(*model, hit_dir);
  for (const std::int64_t start : {0, 64}) {
    const Bytes computed = bench.Page(own[static_cast<std::size_t>(start / 64)]);
    EXPECT_TRUE(from_nothing[start] == computed) << "page at " << start;
    EXPECT_TRUE(over_a_hit[start] == computed) << "page at " << start;
  }
}

void DeviceBitsTest::DiskChangesNoToken(const std::string& cold) {
  const Ids prompt = Random(140), other = Random(140);
  GenerateReply alone;
  {
    const auto service = Serve(4, cold);
    ASSERT_NE(service, nullptr);
    alone = Ask(*service, Request(prompt, ReuseMode::kOff));
    Ask(*service, Request(prompt, ReuseMode::kExact, 1));
    Ask(*service, Request(other, ReuseMode::kExact, 1));
    EXPECT_GT(service->GetStats().pool.evictions, 0);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (service->GetStats().cold.stores < 3 && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
    const GenerateReply again = Ask(*service, Request(prompt, ReuseMode::kExact));
    EXPECT_GE(again.reuse.prefix_tokens, 128);
    EXPECT_EQ(again.ids, alone.ids);
    EXPECT_GT(service->GetStats().cold.hits, 0);
    service->Drain();
    KVS_EXPECT_OK(service->CheckIntegrity());
  }
  const auto restarted = Serve(4, cold);
  ASSERT_NE(restarted, nullptr);
  const GenerateReply reply = Ask(*restarted, Request(prompt, ReuseMode::kExact));
  EXPECT_EQ(reply.reuse.prefix_tokens, 139);
  EXPECT_EQ(reply.ids, alone.ids);
  EXPECT_EQ(restarted->GetStats().cold.integrity_errors, 0);
}

TEST_P(DeviceBitsTest, TheDiskChangesNoToken) {
  for (seed_ = 1; seed_ <= (GetParam() == Where::kDevice ? 1u : 3u); ++seed_) {
    SCOPED_TRACE("seed " + std::to_string(seed_));
    DiskChangesNoToken((dir_.path() / std::to_string(seed_)).string());
  }
}

// In a model of one layer K and V depend on token and position alone, so a chunk computed in any company, at any place,
// is right once it is rotated (as tests/agentd/repair has it, and its tolerance).
TEST_P(DeviceBitsTest, AChunkIsRightWhereItIsPlaced) {
  const auto model = Load(/*layers=*/1);
  Bench bench(model.get());
  const Ids chunk = Random(70);
  Ids there = Random(20), prompt = Random(35);
  there.insert(there.end(), chunk.begin(), chunk.end());
  prompt.insert(prompt.end(), chunk.begin(), chunk.end());
  const Ids question = Random(12);
  prompt.insert(prompt.end(), question.begin(), question.end());
  std::vector<PageIndex> run;
  bench.Plain(there, &run);
  const std::vector<float> want = bench.Plain(prompt);
  double scale = 0;
  for (const float x : want) scale = std::max(scale, std::abs(static_cast<double>(x)));
  for (const ReuseMode mode : {ReuseMode::kRotate, ReuseMode::kEpic}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    agentd::MovedChunk moved{.start = 35, .length = 70, .base = 20};
    moved.pages = run;
    moved.first = 20;
    agentd::RepairOptions options;
    options.mode = mode;
    agentd::MovedPrompt placed(model.get(), bench.pages(), prompt, {}, {moved}, options, nullptr, "agent");
    EXPECT_FALSE(placed.LooksAtRows());
    placed.GivePages(bench.Take(placed.PagesNeeded(1)), 1);
    std::vector<float> got(want.size());
    KVS_ASSERT_OK(placed.Prefill(got.data()));
    double worst = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double error = std::abs(static_cast<double>(got[i]) - static_cast<double>(want[i]));
      if (!(error <= worst)) worst = error;
    }
    EXPECT_LE(worst, kTolerance * scale);
    EXPECT_GT(placed.counts().moved, 50);
  }
}

TEST_P(DeviceBitsTest, AnAgentReadsAnothersNoteWhereItLies) {
  const auto service = Serve(16, "", /*layers=*/1);
  ASSERT_NE(service, nullptr);
  for (const ReuseMode mode : {ReuseMode::kRotate, ReuseMode::kCacheBlend}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    const Ids note = Random(70);
    Ids writer = Random(20), reader = Random(35);
    writer.insert(writer.end(), note.begin(), note.end());
    reader.insert(reader.end(), note.begin(), note.end());
    reader.push_back(1);
    GenerateRequest request = Request(writer, mode, 1);
    request.session = ReuseModeName(mode);
    Ask(*service, request);
    request.prompt = TokenPrompt{reader};
    request.max_tokens = 3;
    const GenerateReply reply = Ask(*service, request);
    // One layer: rotating is all that the note needs.
    EXPECT_EQ(reply.ids, Ask(*service, Request(reader, ReuseMode::kOff, 3)).ids);
    const bool moves = mode == ReuseMode::kRotate;
    EXPECT_EQ(reply.reuse.approximate, moves);
    EXPECT_EQ(reply.reuse.moved_tokens > 60, moves);
    EXPECT_EQ(MissTokens(reply.reuse, "not_on_device") > 60, !moves);
  }
  KVS_EXPECT_OK(service->CheckIntegrity());
}

TEST_P(DeviceBitsTest, ADeviceThatFailsUnderARequestIsNamedInItsError) {
  if (GetParam() == Where::kDevice) GTEST_SKIP() << "a GPU is not broken on purpose";
  const auto service = Serve(8);
  ASSERT_NE(service, nullptr);
  Ask(*service, Request(Random(20), ReuseMode::kExact, 1));
  *broken_ = true;
  const auto recorder = std::make_shared<Recorder>();
  KVS_ASSERT_OK(service->Generate(Request(Random(30), ReuseMode::kExact), recorder));
  const Status error = recorder->Wait().error;
  KVS_EXPECT_FAILS(error, StatusCode::kUnavailable, "emulated GPU: an illegal address");
  KVS_EXPECT_FAILS(error, StatusCode::kUnavailable, "last on the GPU: ");
  const auto late = std::make_shared<Recorder>();
  KVS_EXPECT_FAILS(service->Generate(Request(Random(5), ReuseMode::kOff), late), StatusCode::kUnavailable, "illegal");
  service->Drain();
}

TEST_P(DeviceBitsTest, APoolThatLeavesNoRoomToComputeIsRefused) {
  auto model = Load();
  agentd::ServiceOptions options;
  options.kv_pool_bytes = static_cast<std::int64_t>(model->backend().free_bytes());
  ASSERT_GT(options.kv_pool_bytes, 0);
  KVS_EXPECT_FAILS(agentd::NewService(std::move(model), options).status(), StatusCode::kResourceExhausted,
                   "leaves too little of the device's");
}

INSTANTIATE_TEST_SUITE_P(Cuda, DeviceBitsTest, ::testing::Values(Where::kEmulatedWalk, Where::kDevice),
                         kernels::cuda::WhereName);

}  // namespace
}  // namespace kvshare::testing
