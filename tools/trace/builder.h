// Puts a Trace together line by line, whatever the lines' format: names, bounds, and hand-offs that a log only implies.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kvshare/status.h"
#include "tools/trace/trace.h"

namespace kvshare::trace {

inline constexpr std::int64_t kMaxTokens = 1 << 24;  // of one segment or request: beyond any model's window

class TraceBuilder {
 public:
  static constexpr std::size_t kMaxTextBytes = std::size_t{4} << 30;        // all segments together
  static constexpr std::size_t kMaxBlockIds = std::size_t{1} << 27;         // as written, delta coding not expanded
  static constexpr std::int64_t kMaxRequestBlocks = std::int64_t{1} << 22;  // of one request, expanded

  Trace& trace() { return trace_; }
  const Trace& trace() const { return trace_; }

  // A segment under the name that its file gives it. InvalidArgument when the name is taken, ResourceExhausted beyond
  // the bounds.
  Result<std::uint32_t> AddSegment(const std::string& name, TraceSegment segment);
  std::optional<std::uint32_t> FindSegment(const std::string& name) const;
  // A segment without a name of its own: equal texts are one segment, named as SegmentName says.
  Result<std::uint32_t> AddText(std::string text);
  Result<std::uint32_t> AddTokens(std::vector<TokenId> tokens);  // the same for token ids

  // The ids of a request's own blocks; first_block and own_blocks are set. ResourceExhausted beyond the bounds.
  Status AddBlocks(const std::vector<std::uint64_t>& ids, TraceRequest* request);
  // `keep` blocks of an earlier request come first. `keep` is at most its blocks.
  void Inherit(std::size_t base, std::int64_t keep, TraceRequest* request) const;

  Status AddRequest(TraceRequest request);  // InvalidArgument when its id is taken
  std::optional<std::size_t> FindRequest(const std::string& id) const;
  std::optional<std::size_t> LastOf(const std::string& session) const;  // request added last
  std::size_t CountOf(const std::string& session) const;                // requests so far

  // `text` as segments, cut where an earlier output of `session` of at least kMinHandoff characters occurs verbatim:
  // the longest first. Sources are added to the references.
  Result<std::vector<SegmentRef>> CutAtOutputs(const std::string& session, std::string_view text);
  // Makes the output of `request` known to CutAtOutputs.
  void RememberOutput(const std::string& session, std::size_t request, std::uint32_t segment);
  static constexpr std::size_t kMinHandoff = 64;

 private:
  struct Output {
    std::size_t request;
    std::uint32_t segment;
  };
  static constexpr std::size_t kMaxOutputs = 4096;  // of one session that are looked for

  Trace trace_;
  std::unordered_map<std::string, std::uint32_t> segment_by_name_;
  std::unordered_map<std::string, std::size_t> request_by_id_;
  struct SessionRequests {
    std::size_t count = 0;
    std::size_t last = 0;
  };
  std::unordered_map<std::string, SessionRequests> sessions_;
  std::unordered_map<std::string, std::vector<Output>> outputs_;  // by session, longest first
  std::size_t text_bytes_ = 0;
};

// First 16 hex digits of the text's SHA-256; the "text" of token ids is "tokens" and their little-endian bytes.
std::string SegmentName(std::string_view text);

}  // namespace kvshare::trace
