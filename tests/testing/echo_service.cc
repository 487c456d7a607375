#include "tests/testing/echo_service.h"

#include <chrono>
#include <utility>
#include <variant>

namespace kvshare::testing {
namespace {

constexpr std::chrono::seconds kWaitMax{20};
constexpr int kMaxTokens = 1 << 16;

std::vector<TokenId> BytesAsTokens(std::string_view text) {
  std::vector<TokenId> ids;
  for (char c : text) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}

std::vector<TokenId> PromptTokens(const Prompt& prompt) {
  if (const auto* text = std::get_if<TextPrompt>(&prompt)) return BytesAsTokens(text->text);
  if (const auto* tokens = std::get_if<TokenPrompt>(&prompt)) return tokens->ids;
  return BytesAsTokens(std::get<ChatPrompt>(prompt).messages_json);
}

}  // namespace

EchoService::EchoService() : thread_([this] { Run(); }) {}

EchoService::~EchoService() {
  {
    const std::lock_guard lock(mu_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void EchoService::CloseGate(int chunks) {
  {
    const std::lock_guard lock(mu_);
    gate_ = chunks;
  }
  changed_.notify_all();
}

void EchoService::OpenGate() {
  {
    const std::lock_guard lock(mu_);
    gate_ = -1;
  }
  changed_.notify_all();
}

int EchoService::generations() const {
  const std::lock_guard lock(mu_);
  return static_cast<int>(last_id_);
}

int EchoService::cancellations() const {
  const std::lock_guard lock(mu_);
  return cancellations_;
}

int EchoService::finished() const {
  const std::lock_guard lock(mu_);
  return finished_;
}

int EchoService::running() const {
  const std::lock_guard lock(mu_);
  return static_cast<int>(active_.size());
}

bool EchoService::WaitForCancellations(int count) const {
  std::unique_lock lock(mu_);
  return changed_.wait_for(lock, kWaitMax, [&] { return cancellations_ >= count; });
}

bool EchoService::WaitForFinished(int count) const {
  std::unique_lock lock(mu_);
  return changed_.wait_for(lock, kWaitMax, [&] { return finished_ >= count; });
}

GenerateRequest EchoService::last_request() const {
  const std::lock_guard lock(mu_);
  return last_request_;
}

GenerateReply EchoService::Expected(const GenerateRequest& request) {
  const std::vector<TokenId> prompt = PromptTokens(request.prompt);
  GenerateReply reply;
  reply.prompt_tokens = static_cast<std::int64_t>(prompt.size());
  reply.reuse.fresh_tokens = reply.prompt_tokens;
  reply.reuse.miss_reasons = {{"never_seen", reply.prompt_tokens}};
  reply.finish_reason = FinishReason::kLength;
  for (int i = 0; i < request.max_tokens && !prompt.empty(); ++i) {
    const TokenId id = prompt[static_cast<std::size_t>(i) % prompt.size()];
    reply.ids.push_back(id);
    reply.text.push_back(static_cast<char>('a' + ((id % 26) + 26) % 26));
  }
  return reply;
}

ServerInfo EchoService::Info() const {
  return {.version = "0.0.0",
          .model = "echo",
          .space = "00",
          .dtype = "float32",
          .isa = "none",
          .reuse = ReuseMode::kOff,
          .max_context_tokens = 1 << 20,
          .vocab_size = 256};
}

Result<std::vector<TokenId>> EchoService::Tokenize(std::string_view text) const { return BytesAsTokens(text); }

Result<std::string> EchoService::Detokenize(std::span<const TokenId> ids) const {
  std::string text;
  for (TokenId id : ids) {
    if (id < 0 || id > 255) return InvalidArgument("token " + std::to_string(id) + " is not in the vocabulary");
    text.push_back(static_cast<char>(id));
  }
  return text;
}

Result<RenderReply> EchoService::Render(const RenderRequest& request) const {
  const std::string prompt = request.chat.messages_json + request.chat.tools_json;
  return RenderReply{.prompt = prompt, .ids = BytesAsTokens(prompt)};
}

Result<std::uint64_t> EchoService::Generate(const GenerateRequest& request,
                                            std::shared_ptr<agentd::GenerateSink> sink) {
  if (request.max_tokens < 1 || request.max_tokens > kMaxTokens) {
    return InvalidArgument("max_tokens must be within 1.." + std::to_string(kMaxTokens));
  }
  std::uint64_t id = 0;
  {
    const std::lock_guard lock(mu_);
    id = ++last_id_;
    last_request_ = request;
    Active& active = active_[id];
    active.reply = Expected(request);
    active.reply.request_id = id;
    active.sink = std::move(sink);
  }
  changed_.notify_all();
  return id;
}

void EchoService::Cancel(std::uint64_t request_id) {
  {
    const std::lock_guard lock(mu_);
    const auto found = active_.find(request_id);
    if (found == active_.end()) return;
    found->second.cancelled = true;
  }
  changed_.notify_all();
}

Result<Explanation> EchoService::Explain(const ExplainRequest& request) {
  if (request.request_id != 0) return NotFound("request " + std::to_string(request.request_id) + " is not known");
  const auto length = static_cast<std::int64_t>(PromptTokens(request.prompt).size());
  return Explanation{.spans = {{.kind = "fresh", .start = 0, .length = length, .miss_reason = "never_seen"}}};
}

Stats EchoService::GetStats() const {
  const std::lock_guard lock(mu_);
  Stats stats;
  stats.totals.requests = static_cast<std::int64_t>(last_id_);
  stats.requests_running = static_cast<std::int64_t>(active_.size());
  stats.agents["default"] = stats.totals;
  return stats;
}

EchoService::Active* EchoService::Runnable(std::uint64_t* request_id) {
  // Round robin, so that streams interleave.
  auto it = active_.upper_bound(*request_id);
  for (std::size_t i = 0; i < active_.size(); ++i, ++it) {
    if (it == active_.end()) it = active_.begin();
    Active& active = it->second;
    const bool gated = gate_ >= 0 && active.told >= static_cast<std::size_t>(gate_);
    if (!active.cancelled && gated) continue;
    *request_id = it->first;
    return &active;
  }
  return nullptr;
}

void EchoService::Run() {
  std::unique_lock lock(mu_);
  std::uint64_t id = 0;
  while (true) {
    Active* active = nullptr;
    changed_.wait(lock, [&] { return stopping_ || (active = Runnable(&id)) != nullptr; });
    if (stopping_) return;
    // Only this thread erases, so that `active` stays while the lock is open.
    const std::shared_ptr<agentd::GenerateSink> sink = active->sink;
    if (active->cancelled) {
      active_.erase(id);
      lock.unlock();
      sink->OnError(Cancelled("the request was cancelled"));
      lock.lock();
      ++cancellations_;
      changed_.notify_all();
      continue;
    }
    if (active->told < active->reply.ids.size()) {
      const std::size_t i = active->told++;
      TokenChunk chunk{.ids = {active->reply.ids[i]}, .text = active->reply.text.substr(i, 1)};
      lock.unlock();
      sink->OnChunk(std::move(chunk));
      lock.lock();
      continue;
    }
    GenerateReply reply = std::move(active->reply);
    active_.erase(id);
    lock.unlock();
    sink->OnDone(std::move(reply));
    lock.lock();
    ++finished_;
    changed_.notify_all();
  }
}

}  // namespace kvshare::testing
