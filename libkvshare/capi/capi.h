// What the files of the C interface share. Included by nobody else.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "kvshare/client.h"
#include "kvshare/kvshare.h"
#include "kvshare/status.h"

struct kvs_client {
  std::chrono::milliseconds timeout;        // of every call but Generate
  std::shared_ptr<kvshare::Client> client;  // shared with streams, which need it as long as they are read
};

namespace kvshare::capi {

// Keeps the words for kvs_last_error and returns the code.
kvs_status Report(const Status& status);

// Runs `body`, which returns a Status; nothing that it throws gets out.
template <typename Body>
kvs_status Guarded(Body body) {
  try {
    const Status status = body();
    return status.ok() ? KVS_OK : Report(status);
  } catch (const std::exception& error) {
    return Report(Internal(error.what()));
  } catch (...) {
    return Report(Internal("an unknown exception"));
  }
}

// The caller's struct as this version knows it: what the caller does not have is zero.
template <typename T>
Status ReadStruct(const T* in, std::string_view name, T* out) {
  if (in == nullptr) return InvalidArgument(std::string(name) + " is NULL");
  if (in->struct_size < sizeof(std::size_t) || in->struct_size > 65536) {
    return InvalidArgument(std::string(name) + ".struct_size is not set");
  }
  *out = T{};
  std::memcpy(out, in, std::min(in->struct_size, sizeof(T)));
  return OkStatus();
}

// `value` as far as the caller's struct reaches; its struct_size stays.
template <typename T>
Status WriteStruct(const T& value, std::string_view name, T* out) {
  if (out == nullptr) return InvalidArgument(std::string(name) + " is NULL");
  const std::size_t size = out->struct_size;
  if (size < sizeof(std::size_t) || size > 65536) {
    return InvalidArgument(std::string(name) + ".struct_size is not set");
  }
  std::memcpy(out, &value, std::min(size, sizeof(T)));
  out->struct_size = size;
  return OkStatus();
}

// Cut to fit, terminated.
template <std::size_t kSize>
void CopyName(const std::string& name, char (&out)[kSize]) {
  const std::size_t size = std::min(name.size(), kSize - 1);
  std::memcpy(out, name.data(), size);
  out[size] = '\0';
}

// For kvs_free. Null when memory is short.
char* CopyText(std::string_view text);
Status HandOut(std::string_view text, char** out);
Status HandOut(const std::vector<TokenId>& ids, std::int32_t** out, std::size_t* count);

struct PromptParts {
  Prompt prompt;
  std::string agent;
  std::string session;
};
Result<PromptParts> ReadPrompt(const kvs_prompt* prompt);
Result<std::optional<ReuseMode>> ReadReuse(std::int32_t reuse);
Status CheckClient(const kvs_client* client);

}  // namespace kvshare::capi
