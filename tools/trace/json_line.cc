#include "tools/trace/json_line.h"

#include <utility>

namespace kvshare::trace {
namespace {

bool DeeperThan(std::string_view line, int limit) {
  int depth = 0;
  bool in_text = false;
  for (std::size_t i = 0; i < line.size(); ++i) {
    const char c = line[i];
    if (in_text) {
      if (c == '\\') ++i;
      if (c == '"') in_text = false;
    } else if (c == '"') {
      in_text = true;
    } else if (c == '[' || c == '{') {
      if (++depth > limit) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

}  // namespace

Result<nlohmann::json> ParseJsonLine(std::string_view line) {
  if (line.size() > kMaxLineBytes) return ResourceExhausted("longer than 64 MiB");
  if (DeeperThan(line, kMaxJsonDepth)) return InvalidArgument("brackets nested deeper than 256");
  nlohmann::json json = nlohmann::json::parse(line, nullptr, false);
  if (json.is_discarded()) return InvalidArgument("not JSON");
  return json;
}

}  // namespace kvshare::trace
