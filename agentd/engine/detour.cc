#include "agentd/engine/detour.h"

#include <algorithm>
#include <utility>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {

Detour::Detour(std::vector<PageIndex> places, PageArena* arena, PinnedBlocks* blocks)
    : places_(std::move(places)), arena_(arena), blocks_(blocks) {
  const std::size_t page_bytes = arena_->pages().layout.page_bytes();
  at_once_ = std::min(blocks_->pages_per_block(), places_.size());
  stride_ = page_bytes;  // as the movers want them
  for (std::size_t read = 0; read < std::min(places_.size(), 2 * at_once_); read += at_once_) {
    std::byte* const block = blocks_->Take();
    if (block != nullptr) parts_.push_back({.memory = block});
  }
  if (!parts_.empty()) return;
  stride_ = (page_bytes + kRecordAlign - 1) / kRecordAlign * kRecordAlign;
  memory_.emplace(at_once_ * stride_);
  parts_.push_back({.memory = memory_->bytes().data()});
}

Detour::~Detour() {
  if (memory_.has_value()) return;
  for (const Part& part : parts_) blocks_->Give(part.memory);
}

std::vector<ColdLoad> Detour::NextLoads(const ColdRun& run) {
  std::vector<ColdLoad> loads;
  Part& part = parts_[turn_];
  if (reading_ || all_sent() || part.copy != nullptr) return loads;
  reading_ = true;
  part.begin = sent_.size();
  const std::size_t page_bytes = arena_->pages().layout.page_bytes();
  for (std::size_t i = 0; i < std::min(at_once_, places_.size() - part.begin); ++i) {
    loads.push_back({.context = run.pages[part.begin + i].context,
                     .destination = std::span(part.memory + i * stride_, page_bytes)});
  }
  return loads;
}

void Detour::SendOn(std::vector<ColdLoaded> loaded) {
  Part& part = parts_[turn_];
  KVS_CHECK(reading_ && part.begin == sent_.size() && loaded.size() <= at_once_);
  reading_ = false;
  turn_ = (turn_ + 1) % parts_.size();
  if (!failed_.ok()) loaded.front().status = failed_;
  const auto bad = std::find_if(loaded.begin(), loaded.end(), [](const ColdLoaded& page) { return !page.status.ok(); });
  const auto good = static_cast<std::size_t>(bad - loaded.begin());
  const bool whole = good == loaded.size();
  sent_.insert(sent_.end(), std::make_move_iterator(loaded.begin()), std::make_move_iterator(loaded.end()));
  if (!whole) {
    sent_.resize(places_.size(), {.status = NotFound("a page before it could not be had"), .page = {}});
  }
  if (good == 0) return;
  if (const Status status = Send(&part, std::span(places_).subspan(part.begin, good)); !status.ok()) {
    EndCopy(&part, status);
  }
}

Status Detour::Send(Part* part, std::span<const PageIndex> places) {
  if (!memory_.has_value()) {
    KVS_ASSIGN_OR_RETURN(part->copy, arena_->movers()->PromotePages(arena_->pages(), part->memory, places));
    return OkStatus();
  }
  const std::size_t page_bytes = arena_->pages().layout.page_bytes();
  for (std::size_t i = 0; i < places.size(); ++i) {
    KVS_RETURN_IF_ERROR(arena_->Write(places[i], std::span(part->memory + i * stride_, page_bytes)));
  }
  return OkStatus();
}

void Detour::EndCopy(Part* part, const Status& status) {
  part->copy.reset();
  if (status.ok()) return;
  failed_ = status;
  if (!reading_) sent_.resize(places_.size());  // else SendOn does
  for (std::size_t i = part->begin; i < sent_.size(); ++i) sent_[i].status = status;
}

bool Detour::copying() const {
  return std::any_of(parts_.begin(), parts_.end(), [](const Part& part) { return part.copy != nullptr; });
}

void Detour::Look() {
  for (Part& part : parts_) {
    if (part.copy == nullptr) continue;
    const Result<bool> done = part.copy->Done();
    if (!done.ok() || *done) EndCopy(&part, done.status());
  }
}

void Detour::AwaitLayer(int layer) {
  for (Part& part : parts_) {
    if (part.copy != nullptr) part.copy->AwaitLayer(layer);
  }
}

std::vector<ColdLoaded> Detour::TakeLoaded() {
  KVS_CHECK(all_sent() && !reading_);
  for (Part& part : parts_) {
    if (part.copy != nullptr) EndCopy(&part, part.copy->Wait());
  }
  return std::move(sent_);
}

}  // namespace kvshare::agentd
