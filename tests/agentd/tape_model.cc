#include "tests/agentd/tape_model.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::testing {
namespace {

using kernels::kPageTokens;
using kernels::KvPages;
using kernels::PageIndex;

constexpr std::uint64_t kEmptyTape = 0x9e3779b97f4a7c15u;

std::uint64_t Mix(std::uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

std::uint64_t Roll(std::uint64_t tape, TokenId id) { return Mix(tape ^ static_cast<std::uint32_t>(id)); }

float Logit(std::uint64_t tape, std::int64_t id) {
  return static_cast<float>(Mix(tape + static_cast<std::uint64_t>(id)) >> 40);
}

std::byte* Tape(const KvPages& pages, PageIndex page, int value) {
  return pages.slab(page, pages.layout.num_layers - 1, value, 0);
}

class HostBuffer final : public kernels::Buffer {
 public:
  HostBuffer(std::size_t bytes, std::byte fill) : bytes_(bytes, fill) {}
  std::byte* data() const override { return bytes_.data(); }
  std::size_t size() const override { return bytes_.size(); }

 private:
  mutable std::vector<std::byte> bytes_;
};

// The part of a backend that agentd itself calls. The model above does the rest without one.
class TapeBackend final : public kernels::Backend {
 public:
  TapeBackend(const TapeModelOptions& options, std::shared_ptr<TapeProbe> probe)
      : probe_(std::move(probe)),
        copies_(
            &probe_->copies, options.pinned_bytes, [this] { return Sync(); },
            [this](std::byte* to, const std::byte* from, std::size_t bytes) { Cross(to, from, bytes); }) {
    has_device_kv_ = options.on_device && options.device_kv;
    capabilities_.device = options.on_device ? "device" : "cpu";
    capabilities_.host_memory = !options.on_device;
    capabilities_.isa = "tape";
    capabilities_.numerics_id = "tape";
  }
  const kernels::Capabilities& capabilities() const override { return capabilities_; }
  Result<std::unique_ptr<kernels::Buffer>> Allocate(std::size_t bytes) override {
    return std::unique_ptr<kernels::Buffer>(
        std::make_unique<HostBuffer>(bytes, capabilities_.host_memory ? std::byte{0} : std::byte{0xff}));
  }
  std::size_t free_bytes() const override { return capabilities_.host_memory ? 0 : std::size_t{1} << 40; }
  Result<std::unique_ptr<kernels::LinearWeights>> MakeLinear(const kernels::LinearSpec&) override {
    return Unimplemented("the tape has no weights");
  }
  void Embed(const kernels::EmbedParams&) override { KVS_CHECK(false); }
  void RmsNorm(const kernels::RmsNormParams&) override { KVS_CHECK(false); }
  void Linear(const kernels::LinearParams&) override { KVS_CHECK(false); }
  void GatedLinear(const kernels::GatedLinearParams&) override { KVS_CHECK(false); }
  void StoreKv(const kernels::StoreKvParams&) override { KVS_CHECK(false); }
  void Attention(const kernels::AttentionParams&) override { KVS_CHECK(false); }
  void CopyPageRows(const KvPages& pages, PageIndex from, PageIndex to, int tokens) override {
    for (int value : {0, 1}) {
      std::memcpy(Tape(pages, to, value), Tape(pages, from, value), sizeof(float) * static_cast<std::size_t>(tokens));
    }
  }
  Status Upload(std::byte* to, const void* from, std::size_t bytes) override {
    KVS_RETURN_IF_ERROR(Sync());
    Cross(to, static_cast<const std::byte*>(from), bytes);
    return OkStatus();
  }
  Status Download(void* to, const std::byte* from, std::size_t bytes) override {
    KVS_RETURN_IF_ERROR(Sync());
    Cross(static_cast<std::byte*>(to), from, bytes);
    return OkStatus();
  }
  kernels::DeviceKv* device_kv() override { return has_device_kv_ ? &copies_ : nullptr; }
  Status Sync() override {
    return !capabilities_.host_memory && probe_->device_lost ? Internal("the test took the device away") : OkStatus();
  }
  Status SelfTest() override { return OkStatus(); }

 private:
  void Cross(std::byte* to, const std::byte* from, std::size_t bytes) const {
    for (std::size_t i = 0; i < bytes; ++i) to[i] = capabilities_.host_memory ? from[i] : ~from[i];
  }

  const std::shared_ptr<TapeProbe> probe_;
  kernels::Capabilities capabilities_;
  bool has_device_kv_ = false;
  LateCopies copies_;
};

class TapeModel final : public runtime::Model {
 public:
  TapeModel(const TapeModelOptions& options, std::shared_ptr<TapeProbe> probe)
      : options_(options), probe_(std::move(probe)), backend_(options, probe_) {
    config_.name = "tape";
    config_.vocab_size = options.vocab_size;
    config_.max_positions = options.max_positions;
    if (options.eos >= 0) config_.eos_ids = {options.eos};
    space_ = DigestBuilder("tape").U64(static_cast<std::uint64_t>(options.weights)).Finish();
  }

  const runtime::ModelConfig& config() const override { return config_; }
  const runtime::Tokenizer* tokenizer() const override { return nullptr; }
  const runtime::ChatTemplate* chat_template() const override { return nullptr; }
  const kernels::Backend& backend() const override { return backend_; }
  kernels::Backend& backend() override { return backend_; }
  // K holds the token's id, V its position + 1.
  kernels::KvLayout kv_layout() const override {
    return {
        .num_layers = options_.layers, .num_kv_heads = 1, .head_dim = options_.head_dim, .dtype = kernels::DType::kF32};
  }
  std::int64_t max_batch_rows() const override { return options_.max_batch_rows; }
  std::size_t weight_bytes() const override { return 0; }
  const Digest& space() const override { return space_; }

  Status Forward(const runtime::ForwardBatch& batch, const KvPages& pages, float* logits) override {
    if (probe_->before_forward) probe_->before_forward();
    ++probe_->forwards;
    const auto rows = static_cast<std::int64_t>(batch.ids.size());
    probe_->rows += rows;
    KVS_CHECK(rows >= 1 && rows <= options_.max_batch_rows);
    KVS_CHECK(batch.positions.size() == batch.ids.size() && batch.slots.size() == batch.ids.size());
    if (probe_->fail_next_forwards > 0) {
      --probe_->fail_next_forwards;
      return Internal("the test asked for a failure");
    }
    KVS_RETURN_IF_ERROR(backend_.Sync());
    for (int layer = 0; batch.gate != nullptr && layer < options_.layers; ++layer) {
      batch.gate->BeforeLayer(layer);
      ++probe_->gated_layers;
    }
    for (std::size_t r = 0; r < batch.ids.size(); ++r) {
      const auto [page, offset] = batch.slots[r];
      Put(pages, page, 0, offset, batch.ids[r]);
      Put(pages, page, 1, offset, static_cast<std::int32_t>(batch.positions[r] + 1));
    }
    std::size_t next_logits = 0;
    std::int64_t next_row = 0;
    for (const kernels::KvSegment& segment : batch.segments) {
      KVS_CHECK(segment.row_begin == next_row && segment.row_end > segment.row_begin && segment.start == 0);
      next_row = segment.row_end;
      ReadSegment(batch, segment, pages, logits, &next_logits);
    }
    KVS_CHECK(next_row == rows && next_logits == batch.logit_rows.size());
    if (probe_->forward_without_numbers > 0 && --probe_->forward_without_numbers == 0) {
      const std::size_t count = next_logits * static_cast<std::size_t>(options_.vocab_size);
      std::fill_n(logits, count, std::numeric_limits<float>::quiet_NaN());
    }
    return OkStatus();
  }

 private:
  void Put(const KvPages& pages, PageIndex page, int value, int offset, std::int32_t x) const {
    KVS_CHECK(page < pages.num_pages && offset >= 0 && offset < kPageTokens);
    if (options_.on_device) x = ~x;
    std::memcpy(Tape(pages, page, value) + 4 * offset, &x, 4);
  }
  std::int32_t Get(const KvPages& pages, PageIndex page, int value, int offset) const {
    KVS_CHECK(page < pages.num_pages);
    std::int32_t x;
    std::memcpy(&x, Tape(pages, page, value) + 4 * offset, 4);
    return options_.on_device ? ~x : x;
  }

  void ReadSegment(const runtime::ForwardBatch& batch, const kernels::KvSegment& segment, const KvPages& pages,
                   float* logits, std::size_t* next_logits) {
    std::uint64_t tape = kEmptyTape;
    std::int64_t row = segment.row_begin;
    for (std::int64_t t = 0; t < segment.length; ++t) {
      const PageIndex page = segment.pages[static_cast<std::size_t>(t / kPageTokens)];
      const int offset = static_cast<int>(t % kPageTokens);
      probe_->wrong_rows += Get(pages, page, 1, offset) != t + 1;
      tape = Roll(tape, Get(pages, page, 0, offset));
      if (row == segment.row_end || batch.positions[static_cast<std::size_t>(row)] != t) continue;
      if (*next_logits < batch.logit_rows.size() && batch.logit_rows[*next_logits] == row) {
        float* out = logits + static_cast<std::int64_t>((*next_logits)++) * options_.vocab_size;
        for (std::int64_t id = 0; id < options_.vocab_size; ++id) out[id] = Logit(tape, id);
      }
      ++row;
    }
    KVS_CHECK(row == segment.row_end);
  }

  const TapeModelOptions options_;
  const std::shared_ptr<TapeProbe> probe_;
  runtime::ModelConfig config_;
  TapeBackend backend_;
  Digest space_;
};

}  // namespace

std::unique_ptr<runtime::Model> NewTapeModel(const TapeModelOptions& options, std::shared_ptr<TapeProbe> probe) {
  return std::make_unique<TapeModel>(options, std::move(probe));
}

std::vector<TokenId> TapeContinuation(const TapeModelOptions& options, std::vector<TokenId> prompt,
                                      std::int64_t count) {
  std::uint64_t tape = kEmptyTape;
  for (TokenId id : prompt) tape = Roll(tape, id);
  std::vector<TokenId> continuation;
  while (static_cast<std::int64_t>(continuation.size()) < count) {
    TokenId best = 0;
    for (TokenId id = 1; id < options.vocab_size; ++id) {
      if (Logit(tape, id) > Logit(tape, best)) best = id;
    }
    if (best == options.eos) break;
    continuation.push_back(best);
    tape = Roll(tape, best);
  }
  return continuation;
}

}  // namespace kvshare::testing
