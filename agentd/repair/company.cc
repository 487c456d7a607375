#include "agentd/repair/company.h"

#include <algorithm>
#include <cstdlib>

namespace kvshare::agentd {
namespace {

// As many equal tokens are taken for the same place in both.
constexpr std::int64_t kSame = 8;

// Whether the last `count` tokens before `i` and `j` are equal.
bool Equal(std::span<const TokenId> here, std::int64_t i, std::span<const TokenId> there, std::int64_t j,
           std::int64_t count) {
  if (i < count || j < count) return false;
  return std::equal(here.begin() + (i - count), here.begin() + i, there.begin() + (j - count));
}

// Leaves out as little as can be before *i and *j, so that what is before that is equal. False when it is too much.
bool LeaveOut(std::span<const TokenId> here, std::int64_t* i, std::span<const TokenId> there, std::int64_t* j,
              std::int64_t lead) {
  constexpr std::int64_t kMost = FirstPlaces::kOtherHeader;
  for (std::int64_t both = 1; both <= 2 * kMost; ++both) {
    for (std::int64_t a = std::max<std::int64_t>(0, both - kMost); a <= std::min(both, kMost); ++a) {
      const std::int64_t count = std::min(kSame, *i - a - lead);
      if (count <= 0 || !Equal(here, *i - a, there, *j - (both - a), count)) continue;
      *i -= a;
      *j -= both - a;
      return true;
    }
  }
  return false;
}

}  // namespace

bool InCompany(std::span<const TokenId> here, std::int64_t lead, std::span<const TokenId> there,
               std::int64_t lead_there) {
  auto i = static_cast<std::int64_t>(here.size()), j = static_cast<std::int64_t>(there.size());
  while (i > lead) {
    if (Equal(here, i, there, j, 1)) {
      --i;
      --j;
    } else if (i - lead <= FirstPlaces::kTask) {
      break;  // what is left is next to the lead
    } else if (!LeaveOut(here, &i, there, &j, lead)) {
      return false;
    }
  }
  return std::abs(i - j) <= kCompanyShift && j <= lead_there + FirstPlaces::kTask;
}

PromptCompany::PromptCompany(std::span<const TokenId> prompt, const RoleMarks& marks)
    : prompt_(prompt), marks_(marks), lead_(RoleTokens(prompt, marks)) {}

bool PromptCompany::InCompany(std::int64_t start, std::span<const TokenId> there, std::int64_t base) {
  const bool in_company = agentd::InCompany(prompt_.first(static_cast<std::size_t>(start)), lead_,
                                            there.first(static_cast<std::size_t>(base)), RoleTokens(there, marks_));
  if (in_company) lead_ = std::min(lead_, start);
  return in_company;
}

bool PromptCompany::SawOther(std::int64_t start, std::int64_t end, std::span<const TokenId> there, std::int64_t base) {
  if (!places_.has_value()) places_.emplace(prompt_);
  auto seen = seen_.find(there.data());
  if (seen == seen_.end()) {
    seen = seen_.emplace(there.data(), places_->SeenIn(there, RoleTokens(there, marks_))).first;
  }
  return places_->SawOther(seen->second, there, base, start, end);
}

std::int64_t PromptCompany::Tail(std::int64_t start, std::int64_t end, std::int64_t least) const {
  const auto size = static_cast<std::int64_t>(prompt_.size());
  if (size - end >= kFreshEnd) return 0;
  const std::int64_t fresh_from = size - 2 * kFreshEnd;
  return fresh_from - start < least ? end - start : end - fresh_from;
}

std::vector<std::size_t> Strays(std::span<const ChunkCompany> chunks) {
  std::int64_t rest = 0, astray = 0;
  for (const ChunkCompany& chunk : chunks) {
    if (chunk.saw_other) continue;
    rest += chunk.tokens;
    if (!chunk.in_company) astray += chunk.tokens;
  }
  const bool few = 2 * astray <= rest;
  std::vector<std::size_t> strays;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    if (chunks[i].saw_other || (few && !chunks[i].in_company)) strays.push_back(i);
  }
  return strays;
}

}  // namespace kvshare::agentd
