// "Did you mean": the nearest known name.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace kvshare {

// The candidate with the smallest edit distance (Damerau: a swap of neighbours counts once) to `name`; empty when none
// is near: more than a third of its letters would have to change.
std::string Nearest(std::string_view name, const std::vector<std::string>& candidates);

}  // namespace kvshare
