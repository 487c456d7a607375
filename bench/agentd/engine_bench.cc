// One decode step, by the model alone and through the engine (plan, page tables, sampling, text, statistics, hand-over
// to the caller's thread), on the tiny model, whose own step is short: the difference is the engine's cost per step.
//   ModelDecode/n   n sequences side by side: Forward and sampling only
//   EngineDecode/n  the same through Service and in-process client
//   EngineHit       a request that is a full hit, one token long: the least a request can take
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "agentd/in_process_client.h"
#include "agentd/service.h"
#include "benchmark/benchmark.h"
#include "runtime/model.h"
#include "runtime/sampler.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::agentd {
namespace {

using kernels::kPageTokens;

constexpr int kPromptTokens = 64;
constexpr int kSteps = 256;

std::unique_ptr<runtime::Model> TinyModel() {
  const testing::TempDir dir;
  if (!testing::WriteTinyModel(dir.path(), {.max_positions = 1024}).ok()) return nullptr;
  auto model = runtime::LoadModel(dir.path().string(), {.dtype = kernels::DType::kF32, .threads = 1});
  return model.ok() ? std::move(*model) : nullptr;
}

GenerateRequest Request(int i, int max_tokens) {
  GenerateRequest request;
  request.prompt = TokenPrompt{std::vector<TokenId>(kPromptTokens, 20 + i)};
  request.max_tokens = max_tokens;
  request.ignore_eos = true;
  request.reuse = ReuseMode::kOff;
  return request;
}

void BM_ModelDecode(benchmark::State& state) {
  const std::unique_ptr<runtime::Model> model = TinyModel();
  if (model == nullptr) return state.SkipWithError("no model");
  const auto sequences = static_cast<std::size_t>(state.range(0));
  constexpr std::size_t kPages = (kPromptTokens + kSteps) / kPageTokens + 1;
  const kernels::KvLayout layout = model->kv_layout();
  const auto buffer = model->backend().Allocate(layout.page_bytes() * kPages * sequences);
  if (!buffer.ok()) return state.SkipWithError("no memory");
  const kernels::KvPages pages = {
      .base = (*buffer)->data(), .num_pages = static_cast<kernels::PageIndex>(kPages * sequences), .layout = layout};
  std::vector<kernels::PageIndex> table(kPages * sequences);
  for (std::size_t p = 0; p < table.size(); ++p) table[p] = static_cast<kernels::PageIndex>(p);
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  std::vector<float> logits(vocab * sequences);
  for (auto _ : state) {
    std::vector<TokenId> last(sequences, 20);
    for (std::int64_t t = kPromptTokens; t < kPromptTokens + kSteps; ++t) {
      runtime::ForwardBatch batch;
      for (std::size_t s = 0; s < sequences; ++s) {
        const auto row = static_cast<std::int64_t>(s);
        const auto own = std::span(table).subspan(s * kPages, kPages);
        batch.ids.push_back(last[s]);
        batch.positions.push_back(t);
        batch.slots.push_back({own[static_cast<std::size_t>(t / kPageTokens)], static_cast<int>(t % kPageTokens)});
        kernels::KvSegment segment;
        segment.length = t + 1;
        segment.pages = own.first(static_cast<std::size_t>(t / kPageTokens + 1));
        segment.row_begin = row;
        segment.row_end = row + 1;
        batch.segments.push_back(segment);
        batch.logit_rows.push_back(row);
      }
      if (!model->Forward(batch, pages, logits.data()).ok()) return state.SkipWithError("forward failed");
      for (std::size_t s = 0; s < sequences; ++s) {
        last[s] = runtime::SampleToken(std::span(logits).subspan(s * vocab, vocab), {}, t);
      }
    }
  }
  state.SetItemsProcessed(state.iterations() * kSteps);
}
BENCHMARK(BM_ModelDecode)->Arg(1)->Arg(8)->Unit(benchmark::kMillisecond)->MeasureProcessCPUTime()->UseRealTime();

void BM_EngineDecode(benchmark::State& state) {
  auto service = NewService(TinyModel(), {.kv_pool_bytes = 64 << 20});
  if (!service.ok()) return state.SkipWithError("no service");
  const auto client = NewInProcessClient(service->get());
  for (auto _ : state) {
    std::vector<std::unique_ptr<TokenStream>> streams;
    for (int s = 0; s < state.range(0); ++s) streams.push_back(std::move(*client->Generate(Request(s, kSteps))));
    for (const auto& stream : streams) {
      while (true) {
        const auto chunk = stream->Next();
        if (!chunk.ok()) return state.SkipWithError("a request failed");
        if (!chunk->has_value()) break;
      }
    }
  }
  state.SetItemsProcessed(state.iterations() * kSteps);
}
BENCHMARK(BM_EngineDecode)->Arg(1)->Arg(8)->Unit(benchmark::kMillisecond)->MeasureProcessCPUTime()->UseRealTime();

void BM_EngineHit(benchmark::State& state) {
  auto service = NewService(TinyModel(), {.kv_pool_bytes = 64 << 20});
  if (!service.ok()) return state.SkipWithError("no service");
  const auto client = NewInProcessClient(service->get());
  GenerateRequest request = Request(0, 1);
  request.prompt = TokenPrompt{std::vector<TokenId>(static_cast<std::size_t>(state.range(0)), 20)};
  request.reuse = ReuseMode::kExact;
  if (!client->GenerateAll(request).ok()) return state.SkipWithError("a request failed");
  for (auto _ : state) {
    const auto reply = client->GenerateAll(request);
    if (!reply.ok() || reply->reuse.prefix_tokens != state.range(0) - 1) return state.SkipWithError("not a hit");
  }
}
BENCHMARK(BM_EngineHit)->Arg(64)->Arg(1000)->Unit(benchmark::kMicrosecond)->MeasureProcessCPUTime()->UseRealTime();

}  // namespace
}  // namespace kvshare::agentd
