#include "tools/trace/mooncake_writer.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "libkvshare/core/check.h"
#include "libkvshare/core/json_text.h"

namespace kvshare::trace {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::uint64_t kRoot = ~std::uint64_t{0};

void Append(std::string* bytes, std::uint64_t value) {
  for (int shift = 0; shift < 64; shift += 8) bytes->push_back(static_cast<char>(value >> shift));
}

}  // namespace

MooncakeWriter::MooncakeWriter(const Trace* trace, std::int64_t block_tokens)
    : trace_(trace), block_tokens_(block_tokens) {
  KVS_CHECK(block_tokens > 0);
}

std::uint64_t MooncakeWriter::Number(std::uint64_t parent, const std::string& content) {
  std::string key;
  Append(&key, parent);
  return numbers_.try_emplace(key + content, numbers_.size()).first->second;
}

// What stands at tokens [begin, end): which part of which recorded block, or this request's own tail.
std::string MooncakeWriter::BlockContent(std::size_t index, const std::vector<std::uint64_t>& blocks,
                                         std::int64_t begin, std::int64_t end) const {
  const std::int64_t recorded = trace_->header.block_tokens;
  const std::uint64_t space = trace_->BlockSpace(trace_->requests[index]);
  std::string content;
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t block = at / recorded;
    const std::int64_t stop = std::min(end, (block + 1) * recorded);
    const bool known = block < static_cast<std::int64_t>(blocks.size());
    Append(&content, known ? space : ~static_cast<std::uint64_t>(index));
    Append(&content, known ? blocks[static_cast<std::size_t>(block)] : static_cast<std::uint64_t>(block));
    Append(&content, static_cast<std::uint64_t>(at - block * recorded));
    at = stop;
  }
  return content;
}

std::string MooncakeWriter::Row(std::size_t index, std::optional<std::span<const TokenId>> ids,
                                std::int64_t output_tokens) {
  const TraceRequest& request = trace_->requests[index];
  const std::vector<std::uint64_t> blocks = ids ? std::vector<std::uint64_t>() : trace_->Blocks(index);
  const std::int64_t tokens = ids ? static_cast<std::int64_t>(ids->size()) : PromptTokens(*trace_, request);
  std::vector<std::uint64_t> numbers;
  std::uint64_t parent = kRoot;
  for (std::int64_t begin = 0; begin < tokens; begin += block_tokens_) {
    const std::int64_t end = std::min(tokens, begin + block_tokens_);
    std::string content;
    if (ids) {
      const auto part =
          std::as_bytes(ids->subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)));
      content.assign(reinterpret_cast<const char*>(part.data()), part.size());
    } else {
      content = BlockContent(index, blocks, begin, end);
    }
    parent = Number(parent, content);
    numbers.push_back(parent);
  }
  Json json = {{"timestamp", static_cast<std::int64_t>(request.timestamp_ms.value_or(0))},
               {"input_length", tokens},
               {"output_length", output_tokens},
               {"hash_ids", std::move(numbers)}};
  if (trace_->header.time_base != TimeBase::kArrival) {
    json["request_id"] = request.id;
    json["session_id"] = request.session;
    if (!request.wait_for.empty()) {
      json["wait_for"] = Json::array();
      for (std::size_t w : request.wait_for) json["wait_for"].push_back(trace_->requests[w].id);
      json["delay"] = static_cast<std::int64_t>(request.delay_ms);
    }
  }
  return JsonText(json) + "\n";
}

}  // namespace kvshare::trace
