#include "agentd/repair/role.h"

#include <algorithm>
#include <optional>
#include <string>

namespace kvshare::agentd {
namespace {

using Ids = std::vector<TokenId>;

// How many first tokens are the same.
std::size_t Common(const Ids& a, const Ids& b) {
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

}  // namespace

RoleMarks RoleMarksOf(const runtime::Model& model) {
  if (model.chat_template() == nullptr || model.tokenizer() == nullptr) return {.ends = model.config().eos_ids};
  return RoleMarksOf(*model.chat_template(), *model.tokenizer());
}

RoleMarks RoleMarksOf(const runtime::ChatTemplate& chat_template, const runtime::Tokenizer& tokenizer) {
  const auto encode = [&](const std::string& messages) -> std::optional<Ids> {
    const Result<std::string> text = chat_template.Render("[" + messages + "]", "", true);
    if (!text.ok()) return std::nullopt;
    return tokenizer.Encode(*text);
  };
  // Digits: no tokenizer joins them with the white space or the word before them.
  const auto system = [](const std::string& digit) { return R"({"role": "system", "content": ")" + digit + R"("})"; };
  const auto user = [](const std::string& digit) { return R"({"role": "user", "content": ")" + digit + R"("})"; };
  const std::optional<Ids> chat = encode(system("1") + "," + user("2"));
  const std::optional<Ids> other_system = encode(system("3") + "," + user("2"));
  const std::optional<Ids> other_user = encode(system("1") + "," + user("3"));
  if (!chat.has_value() || !other_system.has_value() || !other_user.has_value()) return {};
  const std::size_t system_begin = Common(*chat, *other_system), user_begin = Common(*chat, *other_user);
  const auto at = [&](std::size_t i) { return chat->begin() + static_cast<std::ptrdiff_t>(i); };
  const auto special = [&](TokenId id) { return tokenizer.IsSpecial(id); };
  if (system_begin >= user_begin) return {};
  const auto end = std::find_if(at(system_begin), at(user_begin), special);
  if (end == at(user_begin)) return {};
  // What a user's message begins with, where one may come first, tells them apart. Else the header does, without what
  // may stand in front of the content: today's date, in Llama's.
  const std::optional<Ids> alone = encode(user("2"));
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

std::int64_t RoleTokens(std::span<const TokenId> prompt, const RoleMarks& marks) {
  if (prompt.size() < marks.begin.size()) return 0;
  if (!std::equal(marks.begin.begin(), marks.begin.end(), prompt.begin())) return 0;
  const auto end = std::find_first_of(prompt.begin() + static_cast<std::ptrdiff_t>(marks.begin.size()), prompt.end(),
                                      marks.ends.begin(), marks.ends.end());
  return end == prompt.end() ? 0 : end + 1 - prompt.begin();
}

}  // namespace kvshare::agentd
