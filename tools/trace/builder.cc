#include "tools/trace/builder.h"

#include <algorithm>
#include <span>

#include "libkvshare/core/hash.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::trace {
namespace {

// Characters, not bytes: a continuation byte begins none.
std::size_t Characters(std::string_view text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

}  // namespace

std::string SegmentName(std::string_view text) {
  return PlainSha256(std::as_bytes(std::span(text))).Hex().substr(0, 16);
}

Result<std::uint32_t> TraceBuilder::AddSegment(const std::string& name, TraceSegment segment) {
  if (segment_by_name_.contains(name)) return InvalidArgument("segment " + name + " appears twice");
  text_bytes_ += segment.text.size() + segment.tokens.size() * sizeof(TokenId);
  if (text_bytes_ > kMaxTextBytes) return ResourceExhausted("more than 4 GiB of text");
  const auto index = static_cast<std::uint32_t>(trace_.segments.size());
  segment_by_name_.emplace(name, index);
  segment.name = name;
  trace_.segments.push_back(std::move(segment));
  return index;
}

std::optional<std::uint32_t> TraceBuilder::FindSegment(const std::string& name) const {
  const auto found = segment_by_name_.find(name);
  return found == segment_by_name_.end() ? std::nullopt : std::optional(found->second);
}

Result<std::uint32_t> TraceBuilder::AddText(std::string text) {
  const std::string name = SegmentName(text);
  if (const auto known = FindSegment(name)) return *known;
  TraceSegment segment;
  segment.text = std::move(text);
  return AddSegment(name, std::move(segment));
}

Result<std::uint32_t> TraceBuilder::AddTokens(std::vector<TokenId> tokens) {
  const auto bytes = std::as_bytes(std::span(tokens));
  const std::string name =
      SegmentName("tokens" + std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  if (const auto known = FindSegment(name)) return *known;
  TraceSegment segment;
  segment.kind = TraceSegment::Kind::kTokens;
  segment.tokens = std::move(tokens);
  return AddSegment(name, std::move(segment));
}

Status TraceBuilder::AddBlocks(const std::vector<std::uint64_t>& ids, TraceRequest* request) {
  if (ids.size() > kMaxBlockIds - trace_.block_ids.size()) return ResourceExhausted("more than 2^27 block ids");
  request->first_block = trace_.block_ids.size();
  request->own_blocks = static_cast<std::int64_t>(ids.size());
  request->blocks = request->own_blocks + (request->base ? request->keep : 0);
  if (request->blocks > kMaxRequestBlocks) return ResourceExhausted("a request of more than 2^22 blocks");
  trace_.block_ids.insert(trace_.block_ids.end(), ids.begin(), ids.end());
  return OkStatus();
}

void TraceBuilder::Inherit(std::size_t base, std::int64_t keep, TraceRequest* request) const {
  // Straight to the request that wrote the last inherited block, so that chains stay short.
  while (trace_.requests[base].base && keep <= trace_.requests[base].keep) base = *trace_.requests[base].base;
  if (keep == 0) return;
  request->base = base;
  request->keep = keep;
}

Status TraceBuilder::AddRequest(TraceRequest request) {
  if (!request_by_id_.emplace(request.id, trace_.requests.size()).second) {
    return InvalidArgument("request " + request.id + " appears twice");
  }
  SessionRequests& session = sessions_[request.session];
  ++session.count;
  session.last = trace_.requests.size();
  trace_.requests.push_back(std::move(request));
  return OkStatus();
}

std::optional<std::size_t> TraceBuilder::LastOf(const std::string& session) const {
  const auto found = sessions_.find(session);
  return found == sessions_.end() ? std::nullopt : std::optional(found->second.last);
}

std::size_t TraceBuilder::CountOf(const std::string& session) const {
  const auto found = sessions_.find(session);
  return found == sessions_.end() ? 0 : found->second.count;
}

std::optional<std::size_t> TraceBuilder::FindRequest(const std::string& id) const {
  const auto found = request_by_id_.find(id);
  return found == request_by_id_.end() ? std::nullopt : std::optional(found->second);
}

Result<std::vector<SegmentRef>> TraceBuilder::CutAtOutputs(const std::string& session, std::string_view text) {
  // Pieces yet to be looked at, the last one first in the text. Cutting inside out would need recursion as deep as the
  // text has hand-offs.
  struct Piece {
    std::string_view text;
    std::optional<Output> output;
  };
  const auto known = outputs_.find(session);
  std::vector<SegmentRef> refs;
  std::vector<Piece> pieces = {{text, std::nullopt}};
  while (!pieces.empty()) {
    const Piece piece = pieces.back();
    pieces.pop_back();
    if (piece.output) {
      refs.push_back({piece.output->segment, piece.output->request});
      continue;
    }
    if (piece.text.empty()) continue;
    bool cut = false;
    if (piece.text.size() >= kMinHandoff && known != outputs_.end()) {
      for (const Output& output : known->second) {
        const std::string& said = trace_.segments[output.segment].text;
        const std::size_t at = said.size() > piece.text.size() ? piece.text.npos : piece.text.find(said);
        if (at == piece.text.npos) continue;
        pieces.push_back({piece.text.substr(at + said.size()), std::nullopt});
        pieces.push_back({{}, output});
        pieces.push_back({piece.text.substr(0, at), std::nullopt});
        cut = true;
        break;
      }
    }
    if (cut) continue;
    KVS_ASSIGN_OR_RETURN(const std::uint32_t segment, AddText(std::string(piece.text)));
    refs.push_back({segment, std::nullopt});
  }
  return refs;
}

void TraceBuilder::RememberOutput(const std::string& session, std::size_t request, std::uint32_t segment) {
  const std::string& text = trace_.segments[segment].text;
  if (Characters(text) < kMinHandoff) return;
  std::vector<Output>& outputs = outputs_[session];
  const auto shorter = std::find_if(outputs.begin(), outputs.end(), [&](const Output& other) {
    return trace_.segments[other.segment].text.size() < text.size();
  });
  outputs.insert(shorter, {request, segment});
  if (outputs.size() > kMaxOutputs) outputs.pop_back();
}

}  // namespace kvshare::trace
