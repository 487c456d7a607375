// A whole model served by agentd on the CUDA backend: in the emulator always, on a GPU where there is one. Reuse, the
// disk and placing a chunk elsewhere change no answer, and what is stored has the bits of computing it.
#include <atomic>
#include <chrono>
#include <future>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agentd/service.h"
#include "agentd/tiers/aligned_buffer.h"
#include "agentd/tiers/cold_tier.h"
#include "gtest/gtest.h"
#include "tests/agentd/device_bench.h"
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

class DeviceBitsTest : public ::testing::TestWithParam<Where> {
 protected:
  void SetUp() override {
    if (GetParam() == Where::kDevice && !kernels::ProbeCuda().ok()) {
      GTEST_SKIP() << "no GPU to test on: " << kernels::ProbeCuda().status().message();
    }
  }

  std::unique_ptr<runtime::Model> Load(int layers = 2) const {
    return LoadOnCuda(GetParam(), layers, {.seed = seed_, .broken = [broken = broken_] { return broken->load(); }});
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
  DeviceBench bench(model.get());
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

TEST_P(DeviceBitsTest, AnAgentReadsAnothersNoteWhereItLies) {
  const auto service = Serve(16, "", /*layers=*/1);
  ASSERT_NE(service, nullptr);
  const Ids note = Random(70);
  Ids writer = Random(20), reader = Random(35);
  writer.insert(writer.end(), note.begin(), note.end());
  reader.insert(reader.end(), note.begin(), note.end());
  reader.push_back(1);
  GenerateRequest request = Request(writer, ReuseMode::kRotate, 1);
  request.session = "s";
  Ask(*service, request);
  request.prompt = TokenPrompt{reader};
  request.max_tokens = 3;
  const GenerateReply reply = Ask(*service, request);
  // One layer: rotating is all that the note needs.
  EXPECT_EQ(reply.ids, Ask(*service, Request(reader, ReuseMode::kOff, 3)).ids);
  EXPECT_TRUE(reply.reuse.approximate);
  EXPECT_GT(reply.reuse.moved_tokens, 60);
  KVS_EXPECT_OK(service->CheckIntegrity());
}

// As much of the note as on a host; what is asked in mode auto is looked at in idle time before it is trusted.
TEST_P(DeviceBitsTest, AnAgentReadsAnothersNoteAndRepairsIt) {
  const auto service = Serve(24, "", /*layers=*/4);
  ASSERT_NE(service, nullptr);
  for (const ReuseMode mode : {ReuseMode::kCacheBlend, ReuseMode::kDhd, ReuseMode::kKvcomm, ReuseMode::kAuto}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    const Ids note = Random(104);
    // Long first words are a role, or the note would have seen another document.
    Ids writer = testing::TinyRole(random_, 70), reader = Random(35);
    writer.insert(writer.end(), note.begin(), note.end());
    reader.insert(reader.end(), note.begin(), note.end());
    reader.push_back(1);
    GenerateRequest request = Request(writer, mode, 1);
    request.session = ReuseModeName(mode);
    Ask(*service, request);
    request.prompt = TokenPrompt{reader};
    request.max_tokens = 2;
    const GenerateReply reply = Ask(*service, request);
    EXPECT_EQ(MissTokens(reply.reuse, "not_on_device"), 0);
    if (mode == ReuseMode::kKvcomm) {  // the first content of its place
      EXPECT_EQ(reply.ids, Ask(*service, Request(reader, ReuseMode::kOff, 2)).ids);
      EXPECT_GT(MissTokens(reply.reuse, "no_anchor"), 60);
      EXPECT_GT(service->GetStats().anchors.bytes, 0);
      continue;
    }
    if (mode == ReuseMode::kAuto) {
      EXPECT_EQ(reply.ids, Ask(*service, Request(reader, ReuseMode::kOff, 2)).ids);
      EXPECT_FALSE(reply.reuse.approximate);
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
      const auto audits = [&] { return service->GetStats().approximate.shadow_audits.audits; };
      while (audits() == 0 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      EXPECT_EQ(audits(), 1);
      continue;
    }
    EXPECT_TRUE(reply.reuse.approximate);
    EXPECT_EQ(reply.reuse.moved_tokens, 100 - 15);
    EXPECT_EQ(reply.reuse.recomputed_tokens, 15);
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
