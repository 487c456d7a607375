#include "libkvshare/core/json_text.h"

#include <array>
#include <string_view>
#include <utility>

namespace kvshare {

std::string EscapeLineEnds(std::string text) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 3> kLineEnds = {
      {{"\xc2\x85", "\\u0085"}, {"\xe2\x80\xa8", "\\u2028"}, {"\xe2\x80\xa9", "\\u2029"}}};
  for (const auto& [end, escaped] : kLineEnds) {
    for (std::size_t at = text.find(end); at != text.npos; at = text.find(end, at)) {
      text.replace(at, end.size(), escaped);
    }
  }
  return text;
}

}  // namespace kvshare
