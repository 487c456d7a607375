#include "agentd/repair/chunk_correction.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/device_kv.h"
#include "kernels/kv_rows.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

using anchors::Anchor;
using kernels::Backend;
using kernels::Buffer;
using kernels::kPageTokens;
using kernels::KvLayout;
using kernels::KvPages;
using kernels::KvPart;
using kernels::KvSlot;
using kernels::RopeTable;

std::size_t Index(std::int64_t i) { return static_cast<std::size_t>(i); }

std::int64_t Width(const KvLayout& layout) { return std::int64_t{layout.num_kv_heads} * layout.head_dim; }

KvSlot SlotOf(std::span<const kernels::PageIndex> pages, std::int64_t row) {
  return {pages[Index(row / kPageTokens)], static_cast<int>(row % kPageTokens)};
}

// The canonical K and V of a run that the host reads. What it points to must outlive the rows.
anchors::KvRows RowsOf(const KvPages& pages, const RopeTable& rope, const KvRun& run) {
  const auto read = [pages, rope, run](int layer, int part, std::int64_t t, std::span<float> row) {
    kernels::LoadRow(pages, layer, part == 0 ? KvPart::kKey : KvPart::kValue, SlotOf(run.pages, run.first + t), row);
    if (part == 0) kernels::CanonicalKey(rope, run.position + t, pages.layout.head_dim, row);
  };
  return {pages.layout.num_layers, run.tokens, Width(pages.layout), read};
}

class HostCorrection final : public ChunkCorrection {
 public:
  HostCorrection(const KvPages& pages, const RopeTable& rope, const KvRun& stored, anchors::AnchorPool* pool,
                 std::string placeholder, std::string agent)
      : pages_(pages),
        rope_(rope),
        stored_(stored),
        pool_(pool),
        placeholder_(std::move(placeholder)),
        agent_(std::move(agent)) {}

  Result<bool> Shareable() override {
    block_ = RowsOf(pages_, rope_, stored_).ToBlock();
    return pool_->Shareable(placeholder_, block_);
  }

  Status Write(std::span<const KvSlot> to, std::int64_t position) override {
    pool_->Correct(placeholder_, agent_, &block_);
    for (int layer = 0; layer < block_.layers; ++layer) {
      for (std::int64_t t = 0; t < block_.tokens; ++t) {
        const std::span<float> key = block_.row(layer, 0, t);
        kernels::StoredKey(rope_, position + t, pages_.layout.head_dim, key);
        kernels::StoreRow(pages_, layer, KvPart::kKey, to[Index(t)], key);
        kernels::StoreRow(pages_, layer, KvPart::kValue, to[Index(t)], block_.row(layer, 1, t));
      }
    }
    return OkStatus();
  }

 private:
  const KvPages pages_;
  const RopeTable rope_;
  const KvRun stored_;
  anchors::AnchorPool* const pool_;
  const std::string placeholder_, agent_;
  anchors::KvBlock block_;
};

class DeviceCorrection final : public ChunkCorrection {
 public:
  DeviceCorrection(Backend& backend, DeviceAnchors* cache, const KvPages& pages, const RopeTable& rope,
                   const KvRun& stored, anchors::AnchorPool* pool, std::string placeholder, std::string agent)
      : backend_(backend),
        cache_(cache),
        stored_(stored),
        pool_(pool),
        placeholder_(std::move(placeholder)),
        agent_(std::move(agent)) {
    for (std::int64_t t = 0; t < stored.tokens; ++t) {
      slots_.push_back(SlotOf(stored.pages, stored.first + t));
      positions_.push_back(stored.position + t);
    }
    tokens_ = {.pages = pages, .rope = rope, .stored = slots_, .positions = positions_, .anchors = {}};
  }

  Result<bool> Shareable() override {
    const std::vector<const Anchor*> anchors = pool_->LongEnough(placeholder_, stored_.tokens);
    KVS_CHECK(anchors.size() <= kernels::kMostAnchors);
    for (const Anchor* anchor : anchors) {
      kernels::AnchorKv kv{.tokens = anchor->tokens};
      KVS_ASSIGN_OR_RETURN(kv.base, Get(*anchor, anchor->base));
      if (const auto offset = anchor->offsets.find(agent_); offset != anchor->offsets.end()) {
        KVS_ASSIGN_OR_RETURN(kv.offset, Get(*anchor, offset->second));
      }
      anchors_.push_back(kv);
    }
    tokens_.anchors = anchors_;
    const std::size_t differences = 2 * slots_.size() * std::max<std::size_t>(1, anchors_.size());
    KVS_ASSIGN_OR_RETURN(differences_, backend_.Allocate(differences * sizeof(float)));
    std::vector<float> distances(anchors_.size());
    auto* const to = reinterpret_cast<float*>(differences_->data());
    KVS_RETURN_IF_ERROR(backend_.device_kv()->AnchorDistances(tokens_, to, distances));
    return pool_->Shareable(placeholder_, stored_.tokens, std::vector<double>(distances.begin(), distances.end()));
  }

  Status Write(std::span<const KvSlot> to, std::int64_t position) override {
    std::vector<std::int64_t> positions;
    for (std::int64_t t = 0; t < stored_.tokens; ++t) positions.push_back(position + t);
    backend_.device_kv()->ApplyAnchors(tokens_, reinterpret_cast<const float*>(differences_->data()), to, positions);
    return OkStatus();
  }

 private:
  Result<kernels::CodedKv> Get(const Anchor& anchor, const Anchor::Values& values) {
    KVS_ASSIGN_OR_RETURN(auto copy, cache_->Get(anchor, values));
    copies_.push_back(std::move(copy));
    return copies_.back()->kv;
  }

  Backend& backend_;
  DeviceAnchors* const cache_;
  const KvRun stored_;
  anchors::AnchorPool* const pool_;
  const std::string placeholder_, agent_;
  std::vector<KvSlot> slots_;
  std::vector<std::int64_t> positions_;
  std::vector<kernels::AnchorKv> anchors_;
  std::vector<std::shared_ptr<const DeviceAnchors::Copy>> copies_;  // of the anchors
  std::unique_ptr<Buffer> differences_;
  kernels::AnchoredTokens tokens_;  // of what is above
};

// A run's pages, and the table for its keys, in host memory.
struct HostCopy {
  std::vector<std::byte> bytes;
  std::vector<float> cos, sin;
  std::vector<kernels::PageIndex> table;
  KvPages pages;
  RopeTable rope;
  KvRun run;
};

Status CopyToHost(Backend& backend, const KvPages& pages, const RopeTable& rope, const KvRun& run, HostCopy* copy) {
  const std::size_t page_bytes = pages.layout.page_bytes();
  const auto count = Index((run.first + run.tokens + kPageTokens - 1) / kPageTokens);
  copy->bytes.resize(count * page_bytes);
  for (std::size_t p = 0; p < count; ++p) {
    copy->table.push_back(static_cast<kernels::PageIndex>(p));
    KVS_RETURN_IF_ERROR(
        backend.Download(copy->bytes.data() + p * page_bytes, pages.slab(run.pages[p], 0, 0, 0), page_bytes));
  }
  // From position 0 on, where the table says by what all of it is multiplied.
  const std::int64_t positions = run.position + run.tokens;
  for (const auto& [to, from] : {std::pair{&copy->cos, rope.cos}, std::pair{&copy->sin, rope.sin}}) {
    to->resize(Index(positions * rope.half));
    KVS_RETURN_IF_ERROR(
        backend.Download(to->data(), reinterpret_cast<const std::byte*>(from.data()), to->size() * sizeof(float)));
  }
  copy->pages = {copy->bytes.data(), static_cast<kernels::PageIndex>(count), pages.layout};
  copy->rope = {copy->cos, copy->sin, positions, rope.half};
  copy->run = run;
  copy->run.pages = copy->table;
  return OkStatus();
}

}  // namespace

std::unique_ptr<ChunkCorrection> NewChunkCorrection(Backend& backend, DeviceAnchors* cache, const KvPages& pages,
                                                    const RopeTable& rope, const KvRun& stored,
                                                    anchors::AnchorPool* pool, std::string placeholder,
                                                    std::string agent) {
  if (backend.capabilities().host_memory) {
    return std::make_unique<HostCorrection>(pages, rope, stored, pool, std::move(placeholder), std::move(agent));
  }
  return std::make_unique<DeviceCorrection>(backend, cache, pages, rope, stored, pool, std::move(placeholder),
                                            std::move(agent));
}

Status TeachChunk(Backend& backend, const KvPages& pages, const RopeTable& rope, const KvRun& stored,
                  const KvRun& computed, const std::string& content, anchors::AnchorPool* pool,
                  const std::string& placeholder, const std::string& agent) {
  if (backend.capabilities().host_memory) {
    pool->Register(placeholder, agent, content, RowsOf(pages, rope, stored), RowsOf(pages, rope, computed));
    return OkStatus();
  }
  HostCopy was, is;
  KVS_RETURN_IF_ERROR(CopyToHost(backend, pages, rope, stored, &was));
  KVS_RETURN_IF_ERROR(CopyToHost(backend, pages, rope, computed, &is));
  pool->Register(placeholder, agent, content, RowsOf(was.pages, was.rope, was.run), RowsOf(is.pages, is.rope, is.run));
  return OkStatus();
}

}  // namespace kvshare::agentd
