#include "agentd/repair/session_book.h"

#include <algorithm>
#include <cstdlib>
#include <unordered_map>
#include <utility>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

// Places kept per fingerprint: what recurs more often than this in one session is boilerplate, and any place will do.
constexpr std::size_t kPlacesPerWindow = 16;
// And per run, the first ones.
constexpr std::ptrdiff_t kPlacesPerRun = 8;

// Of recurrences about as long as the longest (by one part in this many), the one that stands where the text before it
// lets expect it, but for a header that may be longer or shorter by so much: an answer that repeats another word for
// word is found as itself.
constexpr std::int64_t kAboutAsLong = 8;
constexpr std::int64_t kHeaderTokens = 32;

// Above the number of any run.
constexpr int kRankShift = 62;

// Polynomial fingerprint modulo 2^64 with an odd multiplier: cheap to roll. Collisions cost a comparison, never a wrong
// answer. Tokens are mixed first, since small consecutive ids make poor digits.
constexpr std::uint64_t kMultiplier = 0x9e3779b97f4a7c15;

std::uint64_t Digit(TokenId id) {
  std::uint64_t x = static_cast<std::uint32_t>(id) + std::uint64_t{0x632be59bd9b4e019};
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9;
  return x ^ (x >> 27);
}

class Fingerprint {
 public:
  Fingerprint() {
    for (std::int64_t i = 0; i < SessionBook::kWindow; ++i) highest_ *= kMultiplier;
  }
  void Add(TokenId in) { value_ = value_ * kMultiplier + Digit(in); }
  void Roll(TokenId in, TokenId out) { value_ = value_ * kMultiplier + Digit(in) - Digit(out) * highest_; }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0;
  std::uint64_t highest_ = 1;
};

// Calls visit(i, fingerprint of tokens[i, i + kWindow)) for every i.
template <typename Visit>
void ForEachWindow(std::span<const TokenId> tokens, Visit visit) {
  constexpr auto kWindow = static_cast<std::size_t>(SessionBook::kWindow);
  if (tokens.size() < kWindow) return;
  Fingerprint fingerprint;
  for (std::size_t i = 0; i < kWindow; ++i) fingerprint.Add(tokens[i]);
  visit(std::int64_t{0}, fingerprint.value());
  for (std::size_t i = kWindow; i < tokens.size(); ++i) {
    fingerprint.Roll(tokens[i], tokens[i - kWindow]);
    visit(static_cast<std::int64_t>(i - kWindow + 1), fingerprint.value());
  }
}

}  // namespace

void SessionBook::Record(const std::string& session, std::span<const TokenId> tokens, std::uint32_t source,
                         std::uint64_t since) {
  if (static_cast<std::int64_t>(tokens.size()) < kWindow || tokens.size() > limits_.tokens) return;
  Session& s = Used(session);
  for (auto run = s.runs.begin(); run != s.runs.end();) {
    const std::vector<TokenId>& known = run->second.tokens;
    const std::size_t common = std::min(known.size(), tokens.size());
    const bool prefix = !run->second.kept.has_value() &&
                        std::equal(known.begin(), known.begin() + static_cast<std::ptrdiff_t>(common), tokens.begin());
    const std::uint64_t number = run->first;
    ++run;
    if (!prefix) continue;
    if (known.size() >= tokens.size()) return;  // nothing new
    Drop(s, number);
  }
  Add(s, {.tokens = {tokens.begin(), tokens.end()}, .source = source, .kept = std::nullopt, .since = since});
}

void SessionBook::RecordKept(const std::string& session, std::int64_t length, std::uint32_t source, KeptKv kv) {
  const auto tokens =
      std::span(*kv.prompt).subspan(static_cast<std::size_t>(kv.position), static_cast<std::size_t>(length));
  if (length < kWindow || tokens.size() > limits_.tokens) return;
  Add(Used(session), {.tokens = {tokens.begin(), tokens.end()}, .source = source, .kept = std::move(kv)});
}

std::uint64_t SessionBook::ForgetKept(const std::string& session, std::uint64_t name) {
  const auto known = sessions_.find(session);
  if (known == sessions_.end()) return 0;
  std::vector<std::uint64_t> numbers;
  for (const auto& [number, run] : known->second.runs) {
    if (run.kept.has_value() && run.kept->name == name) numbers.push_back(number);
  }
  for (const std::uint64_t number : numbers) Drop(known->second, number);
  return numbers.empty() ? 0 : numbers.front();
}

SessionBook::Session& SessionBook::Used(const std::string& name) {
  auto found = sessions_.find(name);
  if (found == sessions_.end()) {
    recency_.push_front(name);
    found = sessions_.emplace(name, Session{}).first;
    found->second.recency = recency_.begin();
  }
  recency_.splice(recency_.begin(), recency_, found->second.recency);
  return found->second;
}

// Of the session used last.
void SessionBook::Add(Session& session, Run run) {
  if (session.runs.size() >= limits_.runs_per_session) Drop(session, session.runs.begin()->first);
  const std::uint64_t number = next_run_++;
  tokens_ += run.tokens.size();
  if (run.since == 0) run.since = number;
  session.runs[number] = std::move(run);
  Index(session, number);
  while (sessions_.size() > limits_.sessions || tokens_ > limits_.tokens) {
    if (sessions_.size() > 1) {
      Forget(recency_.back());
    } else {
      Drop(session, session.runs.begin()->first);
    }
  }
}

// Where a text goes round in circles, what follows its first rounds is longest, so the later ones are no places. A
// second such text, behind some other words, has places of its own though it may go round as the first one did: an
// answer that repeats the answer before it is found as itself.
void SessionBook::Index(Session& session, std::uint64_t number) {
  const std::vector<TokenId>& tokens = session.runs[number].tokens;
  std::unordered_map<std::uint64_t, std::int64_t> last;  // where each window was seen last in this run
  last.reserve(tokens.size());
  std::int64_t round = 0;     // how far back the window before this one was seen; 0: nowhere
  std::int64_t circling = 0;  // windows up to this one that were seen as far back as each other
  ForEachWindow(tokens, [&](std::int64_t at, std::uint64_t fingerprint) {
    const auto [seen, first] = last.try_emplace(fingerprint, at);
    const std::int64_t back = at - std::exchange(seen->second, at);
    circling = first ? 0 : back == round ? circling + 1 : 1;
    round = back;
    if (at % kStride != 0 || (!first && circling > back)) return;
    std::vector<Place>& places = session.windows[fingerprint];
    const auto here = [number](const Place& place) { return place.run == number; };
    if (std::count_if(places.begin(), places.end(), here) >= kPlacesPerRun) return;
    if (places.size() >= kPlacesPerWindow) places.erase(places.begin());
    places.push_back({number, at});
  });
}

void SessionBook::Drop(Session& session, std::uint64_t number) {
  const auto run = session.runs.find(number);
  KVS_CHECK(run != session.runs.end());
  ForEachWindow(run->second.tokens, [&](std::int64_t at, std::uint64_t fingerprint) {
    if (at % kStride != 0) return;
    const auto places = session.windows.find(fingerprint);
    if (places == session.windows.end()) return;
    std::erase_if(places->second, [number](const Place& place) { return place.run == number; });
    if (places->second.empty()) session.windows.erase(places);
  });
  tokens_ -= run->second.tokens.size();
  session.runs.erase(run);
}

void SessionBook::Forget(const std::string& name) {
  const auto session = sessions_.find(name);
  for (const auto& [number, run] : session->second.runs) tokens_ -= run.tokens.size();
  recency_.erase(session->second.recency);
  sessions_.erase(session);
}

void SessionBook::Clear() {
  sessions_.clear();
  recency_.clear();
  tokens_ = 0;
}

std::vector<Recurrence> SessionBook::Find(const std::string& session, std::span<const TokenId> prompt,
                                          std::int64_t from, std::int64_t end, std::int64_t min_length, ReuseMode mode,
                                          std::int64_t own, const Rank& rank) const {
  KVS_CHECK(0 <= from && from <= end && end <= static_cast<std::int64_t>(prompt.size()));
  KVS_CHECK(min_length >= kWindow + kStride - 1);
  std::vector<Recurrence> found;
  const auto known = sessions_.find(session);
  if (known == sessions_.end()) return found;
  std::vector<std::uint64_t> left_out;  // ascending
  for (const auto& [number, run] : known->second.runs) {
    const auto size = static_cast<std::int64_t>(std::min(run.tokens.size(), prompt.size()));
    if (run.kept.has_value() || size < own) continue;
    if (std::equal(prompt.begin(), prompt.begin() + own, run.tokens.begin())) left_out.push_back(number);
  }
  std::int64_t free_from = from;  // what is before is taken
  std::int64_t last_shift = 0;    // of the recurrence before
  struct Candidate {
    Recurrence found;
    std::int64_t shift = 0;  // against the prompt in which it was computed
    std::uint64_t rank = 0;  // where `rank` is given: by that, then by age
  };
  std::vector<Candidate> candidates;
  std::int64_t longest = 0;
  const auto part = prompt.subspan(static_cast<std::size_t>(from), static_cast<std::size_t>(end - from));
  const auto look_at = [&](std::int64_t at, std::uint64_t fingerprint) {
    const auto places = known->second.windows.find(fingerprint);
    if (places == known->second.windows.end()) return;
    for (const Place& place : places->second) {
      const Run& run = known->second.runs.at(place.run);
      if (run.kept.has_value() && run.kept->mode != mode) continue;
      if (std::binary_search(left_out.begin(), left_out.end(), place.run)) continue;
      const std::vector<TokenId>& tokens = run.tokens;
      const auto size = static_cast<std::int64_t>(tokens.size());
      const auto same = [&](std::int64_t p, std::int64_t t) {
        return prompt[static_cast<std::size_t>(p)] == tokens[static_cast<std::size_t>(t)];
      };
      std::int64_t right = 0;
      while (at + right < end && place.at + right < size && same(at + right, place.at + right)) ++right;
      std::int64_t left = 0;
      while (at - left > free_from && place.at - left > 0 && same(at - left - 1, place.at - left - 1)) ++left;
      const std::int64_t position = place.at + (run.kept.has_value() ? run.kept->position : 0);
      candidates.push_back({{at - left, left + right, place.at - left, place.run}, at - position});
      longest = std::max(longest, left + right);
      if (rank == nullptr) continue;
      const std::span<const TokenId> whole = run.kept.has_value() ? std::span(*run.kept->prompt) : std::span(tokens);
      const unsigned class_of = rank(whole.first(static_cast<std::size_t>(position - left)));
      candidates.back().rank = (std::uint64_t{class_of} << kRankShift) | run.since;
    }
  };
  std::vector<std::uint64_t> windows;
  ForEachWindow(part, [&windows](std::int64_t, std::uint64_t fingerprint) { windows.push_back(fingerprint); });
  for (std::size_t i = 0; i < windows.size(); ++i) {
    const std::int64_t at = from + static_cast<std::int64_t>(i);
    if (at < free_from) continue;
    candidates.clear();
    longest = 0;
    look_at(at, windows[i]);
    if (longest == 0) continue;
    // Every run that has this text has one of these windows in the index.
    for (std::size_t k = 1; k < kStride && i + k < windows.size(); ++k) {
      look_at(at + static_cast<std::int64_t>(k), windows[i + k]);
    }
    if (longest < min_length) continue;
    const Candidate* best = nullptr;
    for (const Candidate& candidate : candidates) {
      if (candidate.found.length < std::max(min_length, longest - longest / kAboutAsLong)) continue;
      const auto off = [&](const Candidate& c) {
        if (rank != nullptr) return c.rank;
        const std::int64_t shifted = std::abs(c.shift - last_shift);
        return static_cast<std::uint64_t>(shifted <= kHeaderTokens ? 0 : shifted);
      };
      // Later places are of later runs: they win where all else is equal.
      if (best == nullptr || off(candidate) < off(*best) ||
          (off(candidate) == off(*best) && candidate.found.length >= best->found.length)) {
        best = &candidate;
      }
    }
    found.push_back(best->found);
    last_shift = best->shift;
    free_from = best->found.start + best->found.length;
  }
  return found;
}

std::span<const TokenId> SessionBook::tokens(const std::string& session, std::uint64_t run) const {
  return sessions_.at(session).runs.at(run).tokens;
}

std::uint32_t SessionBook::source(const std::string& session, std::uint64_t run) const {
  return sessions_.at(session).runs.at(run).source;
}

const KeptKv* SessionBook::kept(const std::string& session, std::uint64_t run) const {
  const std::optional<KeptKv>& kept = sessions_.at(session).runs.at(run).kept;
  return kept.has_value() ? &*kept : nullptr;
}

}  // namespace kvshare::agentd
