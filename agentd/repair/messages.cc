#include "agentd/repair/messages.h"

#include <algorithm>
#include <cstddef>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

// What a message's header takes, and the name of whoever is quoted: at most so many tokens.
constexpr std::size_t kLongestHeader = 64;
// Messages whose last so many tokens are equal are taken for the same.
constexpr std::size_t kSameEnd = 16;

}  // namespace

Messages::Messages(std::span<const TokenId> prompt, std::span<const TokenId> ends)
    : prompt_(prompt), ends_(ends), begins_({0}) {
  for (std::size_t i = 0; i + 1 < prompt.size(); ++i) {
    if (Ends(prompt[i])) begins_.push_back(static_cast<std::int64_t>(i) + 1);
  }
}

std::size_t Messages::IndexOf(std::int64_t position) const {
  KVS_CHECK(position >= 0);
  return static_cast<std::size_t>(std::upper_bound(begins_.begin(), begins_.end(), position) - begins_.begin()) - 1;
}

bool Messages::Ends(TokenId id) const { return std::find(ends_.begin(), ends_.end(), id) != ends_.end(); }

// How unlike the message that starts at begins_[message] is to one with these tokens before it: 0 where it is the same
// message of its prompt and the one before it ends alike, 1 where only that is so, 2 else. Agents repeat each other
// word for word, several times over: either alone does not tell their answers apart.
unsigned Messages::RankOf(std::span<const TokenId> before, std::size_t message) const {
  const auto here = prompt_.first(static_cast<std::size_t>(begins_[message]));
  std::size_t header = 0;
  while (header < before.size() && header <= kLongestHeader && !Ends(before[before.size() - 1 - header])) ++header;
  before = before.first(before.size() - header);
  if (std::min(before.size(), here.size()) < kSameEnd) return 2;
  if (!std::equal(here.end() - kSameEnd, here.end(), before.end() - kSameEnd)) return 2;
  const auto messages = std::count_if(before.begin(), before.end(), [this](TokenId id) { return Ends(id); });
  return static_cast<std::size_t>(messages) == message ? 0 : 1;
}

// Where less of a message is stored than follows: its beginning.
std::int64_t Messages::LookFrom(std::int64_t from) const {
  const std::size_t message = IndexOf(from);
  const std::int64_t begin = begins_[message];
  const bool last = message + 1 == begins_.size();
  const std::int64_t end = last ? static_cast<std::int64_t>(prompt_.size()) : begins_[message + 1];
  return from - begin <= std::min(kMostAgain, end - from) ? begin : from;
}

std::vector<Recurrence> Messages::Find(const SessionBook& book, const std::string& session, std::int64_t from,
                                       std::int64_t end, std::int64_t min_length, std::int64_t edge,
                                       ReuseMode mode) const {
  std::vector<Recurrence> all;
  const std::int64_t look_from = LookFrom(from);
  for (std::size_t m = IndexOf(look_from); m < begins_.size(); ++m) {
    const std::int64_t begin = begins_[m];
    const std::int64_t message_end = m + 1 == begins_.size() ? end : std::min(end, begins_[m + 1]);
    const std::int64_t first = std::max(look_from, begin + kMessageStep - edge);
    if (first >= message_end) continue;
    const auto rank = [&](std::span<const TokenId> before) { return RankOf(before, m); };
    std::vector<Recurrence> found =
        book.Find(session, prompt_, first, message_end, min_length, mode, SessionBook::kNone, rank);
    std::int64_t known = 0;
    for (const Recurrence& r : found) known += r.length;
    if (2 * known < message_end - first) continue;
    for (Recurrence& r : found) {
      const std::int64_t offset = r.start + edge - begin;
      const std::int64_t skip = (offset + kMessageStep - 1) / kMessageStep * kMessageStep - offset;
      if (r.length - skip < min_length || r.start + r.length - from < min_length) continue;
      r.start += skip;
      r.base += skip;
      r.length -= skip;
      all.push_back(r);
    }
  }
  return all;
}

std::string Messages::PlaceOf(std::int64_t position) const {
  const std::size_t message = IndexOf(position);
  return std::to_string(message) + "+" + std::to_string(position - begins_[message]);
}

}  // namespace kvshare::agentd
