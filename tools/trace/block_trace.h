// A trace as chains of block names: all that a cache of KV pages sees of it. No texts, no model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"

namespace kvshare::trace {

// Requests in the order in which they meet the cache. Blocks are numbered 0, 1, ... in the order of the file.
struct BlockTrace {
  struct Request {
    std::size_t first = 0;  // its blocks: blocks[first, first + count), in prompt order
    std::size_t count = 0;
    std::int64_t tokens = 0;  // of the prompt; they count evenly over its blocks
  };

  std::string name;
  std::vector<Request> requests;
  std::vector<std::uint32_t> blocks;
  std::uint32_t unique_blocks = 0;
  std::int64_t block_tokens = 512;  // in a full block: as the header says, or Mooncake's
  std::int64_t tokens = 0;          // of all prompts

  std::span<const std::uint32_t> BlocksOf(const Request& request) const {
    return std::span(blocks).subspan(request.first, request.count);
  }
};

// Takes the lines of a hash trace: Mooncake JSONL (`hash_ids`, `input_length`, `timestamp`), or KTR-1 with hash_ids,
// delta-coded (`base`, `keep`) or not. Order: by timestamp where one clock rules (Mooncake; time_base "arrival"), else
// eight sessions at once, the next starting when one ends, as ../shared/traces/tools/ktr.py does it, to the last draw.
class BlockTraceParser {
 public:
  BlockTraceParser();
  ~BlockTraceParser();
  BlockTraceParser(const BlockTraceParser&) = delete;
  BlockTraceParser& operator=(const BlockTraceParser&) = delete;

  // InvalidArgument "line N: cause"; Unimplemented for a request of text segments; FailedPrecondition for a KTR version
  // other than 1; ResourceExhausted beyond the bounds below.
  Status AddLine(std::string_view line);
  // InvalidArgument when there was no request.
  Result<BlockTrace> Finish();

  static constexpr std::size_t kMaxLineBytes = std::size_t{64} << 20;
  static constexpr std::size_t kMaxBlocks = std::size_t{1} << 28;  // of all requests together

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Reads a file, plain or gzip. NotFound when it is not there; DataLoss for a damaged gzip stream; else as the parser,
// with the path in front.
Result<BlockTrace> ReadBlockTrace(const std::string& path);

}  // namespace kvshare::trace
