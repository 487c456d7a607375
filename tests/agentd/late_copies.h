// LateCopies: the movers of the tape model's device. A copy is made when somebody awaits it or has asked for it often
// enough, and no sooner; until then its destination is wrong, so a wait that is missing is a wrong bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/device_kv.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::testing {

// What the test sees and says; outlives the device.
struct CopyProbe {
  std::atomic<bool> hold = false;            // no copy ends because somebody asks
  std::atomic<std::int64_t> open = 0;        // transfers whose copies are not over
  std::atomic<std::int64_t> promoted = 0;    // pages
  std::atomic<std::int64_t> demoted = 0;     // pages
  std::atomic<std::int64_t> awaited_in = 0;  // copies onto the device that were made for AwaitLayer
};

class LateCopies final : public kernels::DeviceKv {
 public:
  // `sync`: the backend's; it fails for good. `cross`: copies, and turns every bit round.
  using Cross = std::function<void(std::byte* to, const std::byte* from, std::size_t bytes)>;
  LateCopies(CopyProbe* probe, std::size_t pinned_bytes, std::function<Status()> sync, Cross cross)
      : probe_(probe), pinned_left_(pinned_bytes), sync_(std::move(sync)), cross_(std::move(cross)) {}

  Result<std::unique_ptr<kernels::Buffer>> AllocatePinned(std::size_t bytes) override {
    if (bytes > pinned_left_) return ResourceExhausted("the test's machine has no such memory");
    pinned_left_ -= bytes;
    return std::unique_ptr<kernels::Buffer>(std::make_unique<Pinned>(this, bytes));
  }
  Result<std::unique_ptr<kernels::PageTransfer>> PromotePages(const kernels::KvPages& pages, const std::byte* pinned,
                                                              std::span<const kernels::PageIndex> to) override {
    probe_->promoted += static_cast<std::int64_t>(to.size());
    return Begin(pages, to, const_cast<std::byte*>(pinned), true);  // read only, where it promotes
  }
  Result<std::unique_ptr<kernels::PageTransfer>> DemotePages(const kernels::KvPages& pages,
                                                             std::span<const kernels::PageIndex> from,
                                                             std::byte* pinned) override {
    probe_->demoted += static_cast<std::int64_t>(from.size());
    return Begin(pages, from, pinned, false);
  }

  // agentd asks for nothing else of a tape.
  using Slots = std::span<const kernels::KvSlot>;
  using Pages = std::span<const kernels::PageIndex>;
  void CopyRows(const kernels::KvPages&, Slots, Slots, int, int) override { KVS_CHECK(false); }
  void GatherPages(const kernels::KvPages&, Pages, std::byte*) override { KVS_CHECK(false); }
  void ScatterPages(const kernels::KvPages&, const std::byte*, Pages) override { KVS_CHECK(false); }
  void QuantizePages(const kernels::KvPages&, Pages, kernels::KvCode, std::byte*) override { KVS_CHECK(false); }
  void DequantizePages(const kernels::KvPages&, const std::byte*, kernels::KvCode, Pages) override { KVS_CHECK(false); }
  void ValueDeviation(const kernels::MatrixView&, const kernels::KvPages&, int, Slots,
                      kernels::RowDeviation*) override {
    KVS_CHECK(false);
  }
  Status ChooseRows(const kernels::RowDeviation*, std::int64_t, std::span<std::int32_t>) override { return Unasked(); }
  void AttentionMass(const kernels::AttentionParams&, std::span<const std::int64_t>, std::span<float* const>) override {
    KVS_CHECK(false);
  }
  Status ChooseRowsByMass(const float*, const kernels::RowDeviation*, std::int64_t, std::span<std::int32_t>) override {
    return Unasked();
  }
  Status AnchorDistances(const kernels::AnchoredTokens&, float*, std::span<float>) override { return Unasked(); }
  void ApplyAnchors(const kernels::AnchoredTokens&, const float*, Slots, std::span<const std::int64_t>) override {
    KVS_CHECK(false);
  }

 private:
  struct Copy {
    std::uint64_t transfer = 0;
    int layer = 0;
    bool in = false;
    std::vector<std::pair<std::byte*, const std::byte*>> pieces;  // to, from
    std::size_t piece_bytes = 0;
  };

  class Pinned final : public kernels::Buffer {
   public:
    Pinned(LateCopies* device, std::size_t bytes) : device_(device), bytes_(bytes) {}
    ~Pinned() override {
      const auto mine = [this](const std::byte* at) {
        return at >= bytes_.data() && at < bytes_.data() + bytes_.size();
      };
      for (const Copy& copy : device_->copies_) {
        for (const auto& [to, from] : copy.pieces) KVS_CHECK(!device_->sync_().ok() || (!mine(to) && !mine(from)));
      }
      device_->pinned_left_ += bytes_.size();
    }
    std::byte* data() const override { return bytes_.data(); }
    std::size_t size() const override { return bytes_.size(); }

   private:
    LateCopies* const device_;
    mutable std::vector<std::byte> bytes_;
  };

  class Transfer final : public kernels::PageTransfer {
   public:
    Transfer(LateCopies* device, std::uint64_t id, int layers) : device_(device), id_(id), layers_(layers) {}
    void AwaitLayer(int layer) override {
      KVS_CHECK(layer >= 0 && layer < layers_);
      if (device_->sync_().ok()) device_->RunUntil(id_, layer, true);
    }
    Result<bool> Done() override {
      KVS_RETURN_IF_ERROR(device_->sync_());
      if (device_->Over(id_)) return true;
      if (!device_->probe_->hold) device_->RunOne(false);
      return false;
    }
    Status Wait() override {
      KVS_RETURN_IF_ERROR(device_->sync_());
      device_->RunUntil(id_, layers_ - 1, false);
      return OkStatus();
    }

   private:
    LateCopies* const device_;
    const std::uint64_t id_;
    const int layers_;
  };

  static Status Unasked() { return Unimplemented("the tape's device only copies"); }

  Result<std::unique_ptr<kernels::PageTransfer>> Begin(const kernels::KvPages& pages,
                                                       std::span<const kernels::PageIndex> index, std::byte* pinned,
                                                       bool in) {
    KVS_RETURN_IF_ERROR(sync_());
    const int layers = pages.layout.num_layers;
    const std::size_t page_bytes = pages.layout.page_bytes();
    const std::uint64_t id = ++transfers_;
    ++probe_->open;
    for (int layer = 0; layer < layers; ++layer) {
      Copy copy{id, layer, in, {}, page_bytes / static_cast<std::size_t>(layers)};
      for (std::size_t i = 0; i < index.size(); ++i) {
        std::byte* const there = pages.slab(index[i], layer, 0, 0);
        std::byte* const here = pinned + i * page_bytes + pages.layout.slab_offset(layer, 0, 0);
        copy.pieces.emplace_back(in ? there : here, in ? here : there);
        std::memset(copy.pieces.back().first, 0x5a, copy.piece_bytes);
      }
      copies_.push_back(std::move(copy));
    }
    return std::unique_ptr<kernels::PageTransfer>(std::make_unique<Transfer>(this, id, layers));
  }

  bool Over(std::uint64_t transfer) const { return copies_.empty() || copies_.front().transfer > transfer; }
  void RunUntil(std::uint64_t transfer, int layer, bool awaited) {
    while (!copies_.empty() && (copies_.front().transfer < transfer ||
                                (copies_.front().transfer == transfer && copies_.front().layer <= layer))) {
      RunOne(awaited);
    }
  }
  void RunOne(bool awaited) {
    const Copy copy = std::move(copies_.front());
    copies_.pop_front();
    for (const auto& [to, from] : copy.pieces) cross_(to, from, copy.piece_bytes);
    if (awaited && copy.in) ++probe_->awaited_in;
    if (Over(copy.transfer)) --probe_->open;
  }

  CopyProbe* const probe_;
  std::size_t pinned_left_;
  const std::function<Status()> sync_;
  const Cross cross_;
  std::uint64_t transfers_ = 0;
  std::deque<Copy> copies_;  // one behind the other, as on a stream
};

}  // namespace kvshare::testing
