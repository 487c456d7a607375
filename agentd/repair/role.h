// What a model's chat template says of a prompt: its role, the system message, which says who reads, and where its
// messages end. What comes behind the role is what is read, and may be what a chunk refers to.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvshare/types.h"
#include "runtime/model.h"

namespace kvshare::agentd {

// What a chat template puts around a system message.
struct RoleMarks {
  std::vector<TokenId> begin;  // the prompt's first tokens, as far as no other message begins so
  std::vector<TokenId> ends;   // the first of these ends the message; none: its end cannot be told
};

// From what the model's template makes of two short chats. `ends` is the first special token between a system message
// and a user's; there is none where the template puts both in one message, or refuses system messages (Mistral's older
// ones). A model without a template, whose prompts somebody else has rendered: whatever precedes the first token that
// ends a turn.
RoleMarks RoleMarksOf(const runtime::Model& model);
RoleMarks RoleMarksOf(const runtime::ChatTemplate& chat_template, const runtime::Tokenizer& tokenizer);

// What ends a message: the tokens that end a turn, and the first special token that the template writes behind a user's
// words, which in some (Mistral's) is another, because only answers are turns there.
std::vector<TokenId> MessageEndsOf(const runtime::Model& model);
std::vector<TokenId> MessageEndsOf(const runtime::ChatTemplate& chat_template, const runtime::Tokenizer& tokenizer,
                                   std::vector<TokenId> turn_ends);

// Tokens of the role up to and with what ends it; 0 where the prompt has none.
std::int64_t RoleTokens(std::span<const TokenId> prompt, const RoleMarks& marks);

}  // namespace kvshare::agentd
