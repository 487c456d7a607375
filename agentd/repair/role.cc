#include "agentd/repair/role.h"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

namespace kvshare::agentd {
namespace {

using Ids = std::vector<TokenId>;

// How many first tokens are the same.
std::size_t Common(const Ids& a, const Ids& b) {
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

// Renders short chats, to see what stands between their messages.
class Chats {
 public:
  Chats(const runtime::ChatTemplate& chat_template, const runtime::Tokenizer& tokenizer)
      : template_(chat_template), tokenizer_(tokenizer) {}

  struct Message {
    std::string_view role;
    std::string_view digit;  // the content: no tokenizer joins it with the white space or the word before it
  };
  // Nothing where the template refuses such a chat.
  std::optional<Ids> Of(std::initializer_list<Message> messages) const {
    std::string json;
    for (const Message& m : messages) {
      json += json.empty() ? "[" : ",";
      json.append(R"({"role": ")").append(m.role).append(R"(", "content": ")").append(m.digit).append(R"("})");
    }
    const Result<std::string> text = template_.Render(json + "]", "", true);
    if (!text.ok()) return std::nullopt;
    return tokenizer_.Encode(*text);
  }

 private:
  const runtime::ChatTemplate& template_;
  const runtime::Tokenizer& tokenizer_;
};

}  // namespace

RoleMarks RoleMarksOf(const runtime::Model& model) {
  if (model.chat_template() == nullptr || model.tokenizer() == nullptr) return {.ends = model.config().eos_ids};
  return RoleMarksOf(*model.chat_template(), *model.tokenizer());
}

RoleMarks RoleMarksOf(const runtime::ChatTemplate& chat_template, const runtime::Tokenizer& tokenizer) {
  const Chats chats(chat_template, tokenizer);
  const std::optional<Ids> chat = chats.Of({{"system", "1"}, {"user", "2"}});
  const std::optional<Ids> other_system = chats.Of({{"system", "3"}, {"user", "2"}});
  const std::optional<Ids> other_user = chats.Of({{"system", "1"}, {"user", "3"}});
  if (!chat.has_value() || !other_system.has_value() || !other_user.has_value()) return {};
  const std::size_t system_begin = Common(*chat, *other_system), user_begin = Common(*chat, *other_user);
  const auto at = [&](std::size_t i) { return chat->begin() + static_cast<std::ptrdiff_t>(i); };
  const auto special = [&](TokenId id) { return tokenizer.IsSpecial(id); };
  if (system_begin >= user_begin) return {};
  const auto end = std::find_if(at(system_begin), at(user_begin), special);
  if (end == at(user_begin)) return {};
  // What a user's message begins with, where one may come first, tells them apart. Else the header does, without what
  // may stand in front of the content: today's date, in Llama's.
  const std::optional<Ids> alone = chats.Of({{"user", "2"}});
  std::size_t begin = alone.has_value() ? Common(*chat, *alone) : system_begin;
  if (begin >= system_begin) {
    begin = system_begin;
    while (begin > 0 && !special(*at(begin - 1))) --begin;
  }
  begin = std::min(begin + 1, system_begin);
  RoleMarks marks{.ends = {*end}};
  marks.begin.assign(chat->begin(), at(begin));
  return marks;
}

std::vector<TokenId> MessageEndsOf(const runtime::Model& model) {
  const std::vector<TokenId>& turn_ends = model.config().eos_ids;
  if (model.chat_template() == nullptr || model.tokenizer() == nullptr) return turn_ends;
  return MessageEndsOf(*model.chat_template(), *model.tokenizer(), turn_ends);
}

std::vector<TokenId> MessageEndsOf(const runtime::ChatTemplate& chat_template, const runtime::Tokenizer& tokenizer,
                                   std::vector<TokenId> turn_ends) {
  const Chats chats(chat_template, tokenizer);
  const std::optional<Ids> chat = chats.Of({{"user", "1"}, {"assistant", "2"}});
  const std::optional<Ids> other_user = chats.Of({{"user", "3"}, {"assistant", "2"}});
  const std::optional<Ids> other_answer = chats.Of({{"user", "1"}, {"assistant", "3"}});
  if (!chat.has_value() || !other_user.has_value() || !other_answer.has_value()) return turn_ends;
  const std::size_t user_begin = Common(*chat, *other_user), answer_begin = Common(*chat, *other_answer);
  for (std::size_t i = user_begin; i < answer_begin; ++i) {
    const TokenId id = (*chat)[i];
    if (!tokenizer.IsSpecial(id)) continue;
    if (std::find(turn_ends.begin(), turn_ends.end(), id) == turn_ends.end()) turn_ends.push_back(id);
    break;
  }
  return turn_ends;
}

std::int64_t RoleTokens(std::span<const TokenId> prompt, const RoleMarks& marks) {
  if (prompt.size() < marks.begin.size()) return 0;
  if (!std::equal(marks.begin.begin(), marks.begin.end(), prompt.begin())) return 0;
  const auto end = std::find_first_of(prompt.begin() + static_cast<std::ptrdiff_t>(marks.begin.size()), prompt.end(),
                                      marks.ends.begin(), marks.ends.end());
  return end == prompt.end() ? 0 : end + 1 - prompt.begin();
}

}  // namespace kvshare::agentd
