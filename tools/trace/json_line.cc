#include "tools/trace/json_line.h"

#include "libkvshare/core/json_text.h"

namespace kvshare::trace {

Result<nlohmann::json> ParseJsonLine(std::string_view line) {
  if (line.size() > kMaxLineBytes) return ResourceExhausted("longer than 64 MiB");
  return ParseJson(line);
}

}  // namespace kvshare::trace
