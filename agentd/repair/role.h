// A prompt's role: its system message, which says who reads. What comes behind it is what is read, and may be what a
// chunk refers to.
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

// Tokens of the role up to and with what ends it; 0 where the prompt has none.
std::int64_t RoleTokens(std::span<const TokenId> prompt, const RoleMarks& marks);

}  // namespace kvshare::agentd
