// kvctl ls, inspect, clear, evict, pin, unpin, prefetch: the stored KV of a running daemon.
#include <cstdio>
#include <string>
#include <utility>

#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/files.h"
#include "tools/kvctl/stat_json.h"
#include "tools/kvctl/target.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

Result<Prompt> MakePrompt(const EntriesOptions& options) {
  if (options.prompt) return Prompt(TextPrompt{*options.prompt});
  if (!options.ids_file.empty()) {
    KVS_ASSIGN_OR_RETURN(auto ids, ReadIds(options.ids_file));
    return Prompt(TokenPrompt{std::move(ids)});
  }
  ChatPrompt chat;
  KVS_ASSIGN_OR_RETURN(chat.messages_json, ReadMessages(options.messages_file));
  return Prompt(std::move(chat));
}

// Connects, asks, prints: what every command here does. `ask` returns the answer's JSON, `text` prints it for people.
template <typename Ask, typename Text>
int Run(const EntriesOptions& options, const Ask& ask, const Text& text) {
  Failure failure;
  const auto target = Target::Open(TargetOf(options.source), &failure);
  if (!target) return Fail(failure);
  const Result<Json> answer = ask(target->client());
  if (!answer.ok()) return Fail(answer.status());
  if (options.format == OutputFormat::kJson) {
    PrintJson(*answer);
  } else {
    text(*answer);
  }
  return kOk;
}

Json EntryJson(const Entry& entry) {
  Json json = {{"key", entry.key},         {"parent", entry.parent}, {"tier", entry.tier},    {"source", entry.source},
               {"start", entry.start},     {"tokens", entry.tokens}, {"bytes", entry.bytes},  {"hits", entry.hits},
               {"idle_ms", entry.idle_ms}, {"leases", entry.leases}, {"pinned", entry.pinned}};
  if (!entry.ids.empty()) json["ids"] = entry.ids;
  return json;
}

long long Number(const Json& json, const char* key) { return json.at(key).get<long long>(); }
std::string Text(const Json& json, const char* key) { return json.at(key).get<std::string>(); }

void PrintEntries(const Json& answer) {
  std::printf("%-16s %-9s %8s %6s %10s %6s %9s %s\n", "key", "tier", "start", "tokens", "bytes", "hits", "idle",
              "source");
  for (const Json& entry : answer.at("entries")) {
    std::printf("%-16.16s %-9s %8lld %6lld %10lld %6lld %7.1f s %s%s%s\n", Text(entry, "key").c_str(),
                Text(entry, "tier").c_str(), Number(entry, "start"), Number(entry, "tokens"), Number(entry, "bytes"),
                Number(entry, "hits"), static_cast<double>(Number(entry, "idle_ms")) / 1000,
                Text(entry, "source").c_str(), entry.at("pinned").get<bool>() ? " (pinned)" : "",
                Number(entry, "leases") > 0 ? " (in use)" : "");
  }
}

EvictRequest EvictOf(const EntriesOptions& options) {
  return {.key = options.key, .host = options.tier != "cold", .cold = options.tier != "host"};
}

int Evict(const EntriesOptions& options) {
  return Run(
      options,
      [&](Client& client) -> Result<Json> {
        KVS_ASSIGN_OR_RETURN(const std::int64_t pages, client.Evict(EvictOf(options)));
        return Json{{"dropped_pages", pages}};
      },
      [](const Json& answer) { std::printf("dropped %lld pages\n", Number(answer, "dropped_pages")); });
}

}  // namespace

int RunLs(const EntriesOptions& options) {
  return Run(
      options,
      [&](Client& client) -> Result<Json> {
        KVS_ASSIGN_OR_RETURN(const auto entries, client.Entries({.key = "", .limit = options.limit}));
        Json list = Json::array();
        for (const Entry& entry : entries) list.push_back(EntryJson(entry));
        return Json{{"entries", std::move(list)}};
      },
      PrintEntries);
}

int RunInspect(const EntriesOptions& options) {
  return Run(
      options,
      [&](Client& client) -> Result<Json> {
        KVS_ASSIGN_OR_RETURN(const auto entries, client.Entries({.key = options.key, .limit = 1}));
        if (entries.empty()) return NotFound("no entry has the key " + options.key);
        Json json = EntryJson(entries.front());
        // Tokens alone may end within a character, and a model without tokenizer has no text at all.
        const auto text = client.Detokenize(entries.front().ids);
        json["text"] = text.ok() ? Json(*text) : Json(nullptr);
        return json;
      },
      [](const Json& answer) {
        for (const auto& [key, value] : answer.items()) {
          if (key == "ids") continue;
          const std::string text = value.is_string() && key != "text" ? value.get<std::string>() : value.dump();
          std::printf("%-9s %s\n", key.c_str(), text.c_str());
        }
      });
}

int RunClear(const EntriesOptions& options) {
  if (!options.yes) {
    const std::string what = options.tier.empty() ? "memory and the cold tier" : options.tier;
    return Fail(kUsage, "this forgets all stored KV of " + what + " that nobody uses; say --yes if that is meant");
  }
  return Evict(options);
}

int RunEvict(const EntriesOptions& options) { return Evict(options); }

int RunPin(const EntriesOptions& options) {
  auto prompt = MakePrompt(options);
  if (!prompt.ok()) return Fail(prompt.status());
  return Run(
      options,
      [&](Client& client) -> Result<Json> {
        KVS_ASSIGN_OR_RETURN(const PinInfo pin, client.Pin({.prompt = std::move(*prompt), .ttl = options.ttl}));
        return Json{{"key", pin.key}, {"tokens", pin.tokens}};
      },
      [](const Json& answer) {
        std::printf("pinned %lld tokens as %s\n", Number(answer, "tokens"), Text(answer, "key").c_str());
      });
}

int RunUnpin(const EntriesOptions& options) {
  return Run(
      options,
      [&](Client& client) -> Result<Json> {
        KVS_RETURN_IF_ERROR(client.Unpin(options.key));
        return Json{{"unpinned", options.key}};
      },
      [](const Json& answer) { std::printf("unpinned %s\n", Text(answer, "unpinned").c_str()); });
}

int RunPrefetch(const EntriesOptions& options) {
  auto prompt = MakePrompt(options);
  if (!prompt.ok()) return Fail(prompt.status());
  return Run(
      options,
      [&](Client& client) -> Result<Json> {
        KVS_ASSIGN_OR_RETURN(const std::int64_t tokens,
                             client.Prefetch({std::move(*prompt), options.agent, options.session}));
        return Json{{"tokens", tokens}};
      },
      [](const Json& answer) { std::printf("%lld leading tokens are in memory\n", Number(answer, "tokens")); });
}

}  // namespace kvshare::kvctl
