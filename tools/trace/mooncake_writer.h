// Traces as Mooncake's JSONL, for the many tools that read it: lengths, and one chained number per block.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "tools/trace/trace.h"

namespace kvshare::trace {

// Numbers blocks in the order of their first appearance; two blocks have one number when they and everything before
// them are equal. A last, partly filled block has a number too.
//
// Beside Mooncake's four fields a row has session_id, request_id, wait_for and delay where the trace has no common
// clock: AIPerf and Dynamo read these, others ignore them.
class MooncakeWriter {
 public:
  // `trace` must outlive it. Requires: block_tokens > 0.
  MooncakeWriter(const Trace* trace, std::int64_t block_tokens);

  // One line with its end. `ids`: the prompt's tokens; nullopt for a request that has block ids, whose blocks are then
  // split or joined.
  std::string Row(std::size_t request, std::optional<std::span<const TokenId>> ids, std::int64_t output_tokens);

 private:
  std::uint64_t Number(std::uint64_t parent, const std::string& content);
  std::string BlockContent(std::size_t request, const std::vector<std::uint64_t>& blocks, std::int64_t begin,
                           std::int64_t end) const;

  const Trace* trace_;
  std::int64_t block_tokens_;
  std::unordered_map<std::string, std::uint64_t> numbers_;
};

}  // namespace kvshare::trace
