#include "libkvshare/capi/capi.h"

#include <cstdlib>

namespace kvshare::capi {
namespace {

// Of this thread alone, so that one thread's failure does not speak over another's.
std::string& LastError() {
  thread_local std::string error;
  return error;
}

}  // namespace

kvs_status Report(const Status& status) {
  try {
    LastError() = status.message();
  } catch (...) {
    LastError().clear();  // no memory for words; the code remains
  }
  return static_cast<kvs_status>(status.code());
}

char* CopyText(std::string_view text) {
  auto* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy == nullptr) return nullptr;
  std::memcpy(copy, text.data(), text.size());
  copy[text.size()] = '\0';
  return copy;
}

Status HandOut(std::string_view text, char** out) {
  char* copy = CopyText(text);
  if (copy == nullptr) return ResourceExhausted("no memory for the answer");
  *out = copy;
  return OkStatus();
}

Status HandOut(const std::vector<TokenId>& ids, std::int32_t** out, std::size_t* count) {
  const std::size_t bytes = ids.size() * sizeof(std::int32_t);
  auto* copy = static_cast<std::int32_t*>(std::malloc(std::max<std::size_t>(bytes, 1)));
  if (copy == nullptr) return ResourceExhausted("no memory for the answer");
  if (bytes > 0) std::memcpy(copy, ids.data(), bytes);
  *out = copy;
  *count = ids.size();
  return OkStatus();
}

Result<PromptParts> ReadPrompt(const kvs_prompt* prompt) {
  kvs_prompt in{};
  const Status read = ReadStruct(prompt, "prompt", &in);
  if (!read.ok()) return read;
  const int given = (in.text != nullptr) + (in.ids != nullptr) + (in.messages_json != nullptr);
  if (given != 1) return InvalidArgument("a prompt has one of text, ids and messages_json");
  PromptParts parts;
  if (in.text != nullptr) {
    parts.prompt = TextPrompt{std::string(in.text, in.text_len)};
  } else if (in.ids != nullptr) {
    parts.prompt = TokenPrompt{std::vector<TokenId>(in.ids, in.ids + in.num_ids)};
  } else {
    ChatPrompt chat{.messages_json = std::string(in.messages_json, in.messages_len)};
    if (in.tools_json != nullptr) chat.tools_json.assign(in.tools_json, in.tools_len);
    chat.add_generation_prompt = in.no_generation_prompt == 0;
    parts.prompt = std::move(chat);
  }
  if (in.agent != nullptr) parts.agent = in.agent;
  if (in.session != nullptr) parts.session = in.session;
  return parts;
}

Result<std::optional<ReuseMode>> ReadReuse(std::int32_t reuse) {
  if (reuse == KVS_REUSE_DEFAULT) return std::optional<ReuseMode>();
  if (reuse < 0 || reuse > KVS_REUSE_AUTO) {
    return InvalidArgument("reuse mode " + std::to_string(reuse) + " is not known to this version");
  }
  return std::optional<ReuseMode>(static_cast<ReuseMode>(reuse - 1));
}

Status CheckClient(const kvs_client* client) {
  return client == nullptr ? InvalidArgument("client is NULL") : OkStatus();
}

}  // namespace kvshare::capi

extern "C" {

const char* kvs_version(void) { return KVSHARE_VERSION; }
uint32_t kvs_abi_version(void) { return KVS_ABI_VERSION; }
const char* kvs_last_error(void) { return kvshare::capi::LastError().c_str(); }
void kvs_free(void* memory) { std::free(memory); }

}  // extern "C"
