// Messages: where a prompt's messages are, for KVCOMM, whose placeholders are messages: the task, an answer.
//
//   prompt:  |- role -|E|- header, "planner wrote:" -|-- the answer --|E|- header, ... -|E|- the reply's header -|
//                       |-------- one message ------------------------|
//                       begin             begin + kStep               end             E: an end-of-message token
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "agentd/repair/session_book.h"
#include "kvshare/types.h"

namespace kvshare::agentd {

// What stands in the same place of two prompts of one template must begin at the same token, or what was learnt of one
// says nothing of the other. So what is found of a message begins a multiple of so many tokens after its beginning,
// which leaves room for its header, and for the name of whoever is quoted.
inline constexpr std::int64_t kMessageStep = 16;

// Of one prompt; that and `ends` must outlive it.
class Messages {
 public:
  // `ends`: the tokens that end a message; they belong to it. A prompt without any is one message.
  Messages(std::span<const TokenId> prompt, std::span<const TokenId> ends);

  // Recurrences as SessionBook::Find gives them, each within one message and of the first run that has it: that is
  // where an answer was written, or a task read first, whoever has read it since. Of texts that are the same word for
  // word (agents repeat each other) it is the one that stands where it stands here. `edge` tokens after its beginning
  // each is at a multiple of kMessageStep of its message. Of a message of which less than half is known there is
  // nothing: such pieces recur by chance, and what stands on them could not be found as one by those who read it next.
  //
  // The prompt's first `from` tokens are stored, and yet the first recurrence may begin before them, up to kMostAgain
  // tokens: how far a new message happens to agree with an older one must not decide where it is found.
  std::vector<Recurrence> Find(const SessionBook& book, const std::string& session, std::int64_t from, std::int64_t end,
                               std::int64_t min_length, std::int64_t edge, ReuseMode mode) const;

  // Names a place: "2+16" is 16 tokens after the beginning of the prompt's third message.
  std::string PlaceOf(std::int64_t position) const;

  static constexpr std::int64_t kMostAgain = 64;

 private:
  bool Ends(TokenId id) const;
  unsigned RankOf(std::span<const TokenId> before, std::size_t message) const;
  std::int64_t LookFrom(std::int64_t from) const;
  std::size_t IndexOf(std::int64_t position) const;

  const std::span<const TokenId> prompt_;
  const std::span<const TokenId> ends_;
  std::vector<std::int64_t> begins_;  // of messages, ascending; the first is 0
};

}  // namespace kvshare::agentd
