#include "tests/testing/echo_service.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <utility>
#include <variant>

#include "libkvshare/core/hash.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::testing {
namespace {

constexpr std::chrono::seconds kWaitMax{20};
constexpr int kMaxTokens = 1 << 16;
constexpr std::int64_t kPage = 64;

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

void EchoService::HoldGenerate() {
  const std::lock_guard lock(mu_);
  holds_ = true;
}

bool EchoService::WaitForHeld() const {
  std::unique_lock lock(mu_);
  return changed_.wait_for(lock, kWaitMax, [this] { return held_; });
}

void EchoService::LetIn() {
  {
    const std::lock_guard lock(mu_);
    holds_ = held_ = false;
  }
  changed_.notify_all();
}

void EchoService::FailNextGenerate() {
  const std::lock_guard lock(mu_);
  fails_ = true;
}

int EchoService::texts() const {
  const std::lock_guard lock(mu_);
  return texts_;
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
          .vocab_size = 256,
          .device = "cpu"};
}

Result<std::vector<TokenId>> EchoService::Tokenize(std::string_view text) const {
  const std::lock_guard lock(mu_);
  ++texts_;
  return BytesAsTokens(text);
}

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
  if (request.max_tokens < 0 || request.max_tokens > kMaxTokens) {
    return InvalidArgument("max_tokens must be within 0.." + std::to_string(kMaxTokens));
  }
  std::uint64_t id = 0;
  {
    std::unique_lock lock(mu_);
    if (std::exchange(fails_, false)) throw std::bad_alloc();
    held_ = holds_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !holds_; });
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

Result<Match> EchoService::Lookup(const LookupRequest& request) {
  const auto length = static_cast<std::int64_t>(PromptTokens(request.prompt).size());
  if (length == 0) return InvalidArgument("the prompt is empty");
  return Match{.prompt_tokens = length, .prefix_tokens = length - 1, .host_tokens = length - 1};
}

Result<LeaseInfo> EchoService::Acquire(const AcquireRequest& request) {
  const auto length = static_cast<std::int64_t>(PromptTokens(request.prompt).size());
  if (length == 0) return InvalidArgument("the prompt is empty");
  LeaseInfo info;
  info.tokens = length;
  info.ttl = request.ttl;
  const agentd::SharedPages shared = Shared();
  info.layout = shared.layout;
  const std::lock_guard lock(mu_);
  for (std::int64_t start = 0; start < length; start += kPage) {
    const std::int64_t page = num_pages_ == 0 ? start / kPage : start / kPage % num_pages_;
    info.pages.push_back({.offset = page * page_bytes_,
                          .start = start,
                          .valid_tokens = static_cast<int>(std::min<std::int64_t>(kPage, length - start)),
                          .generation = shared.generations == nullptr ? 0 : shared.generations[page].load()});
  }
  info.id = ++last_lease_;
  leases_.insert(info.id);
  return info;
}

Status EchoService::Release(std::uint64_t lease) {
  const std::lock_guard lock(mu_);
  if (leases_.erase(lease) == 0) return NotFound("lease " + std::to_string(lease) + " is not held");
  changed_.notify_all();
  return OkStatus();
}

agentd::SharedPages EchoService::Shared() const {
  agentd::SharedPages shared;
  shared.layout = {.num_layers = 1, .num_kv_heads = 1, .head_dim = 8, .page_tokens = kPage, .page_bytes = page_bytes_};
  shared.layout.dtype = "float32";
  if (memory_ == nullptr) return shared;
  shared.memory = memory_->data();
  shared.generations = reinterpret_cast<const std::atomic<std::uint64_t>*>(generations_->data());
  shared.num_pages = num_pages_;
  shared.memory_fd = memory_->fd();
  shared.generations_fd = generations_->fd();
  return shared;
}

Status EchoService::ShareMemory(std::int64_t num_pages, std::int64_t page_bytes) {
  const auto bytes = static_cast<std::size_t>(num_pages * page_bytes);
  const auto generation_bytes = static_cast<std::size_t>(num_pages) * sizeof(std::uint64_t);
  KVS_ASSIGN_OR_RETURN(memory_, agentd::SharedMemory::Create("echo-pages", bytes, bytes));
  KVS_ASSIGN_OR_RETURN(generations_,
                       agentd::SharedMemory::Create("echo-generations", generation_bytes, generation_bytes));
  num_pages_ = num_pages;
  page_bytes_ = page_bytes;
  for (std::int64_t page = 0; page < num_pages; ++page) {
    std::memset(memory_->data() + page * page_bytes, FillOf(page), static_cast<std::size_t>(page_bytes));
  }
  return OkStatus();
}

void EchoService::Reuse(std::int64_t page, unsigned char fill) {
  const std::lock_guard lock(mu_);  // no lease is given of a page in change
  reinterpret_cast<std::atomic<std::uint64_t>*>(generations_->data())[page].fetch_add(1);
  std::memset(memory_->data() + page * page_bytes_, fill, static_cast<std::size_t>(page_bytes_));
}

bool EchoService::WaitForLeases(int at_most) const {
  std::unique_lock lock(mu_);
  return changed_.wait_for(lock, kWaitMax, [&] { return static_cast<int>(leases_.size()) <= at_most; });
}

int EchoService::leases() const {
  const std::lock_guard lock(mu_);
  return static_cast<int>(leases_.size());
}

Result<PinInfo> EchoService::Pin(const PinRequest& request) {
  const auto tokens = PromptTokens(request.prompt);
  if (tokens.empty()) return NotFound("nothing of the prompt is stored");
  PinInfo info{.key = ContentDigest(tokens).Hex(), .tokens = static_cast<std::int64_t>(tokens.size())};
  const std::lock_guard lock(mu_);
  pins_.insert(info.key);
  return info;
}

Status EchoService::Unpin(const std::string& key) {
  const std::lock_guard lock(mu_);
  if (pins_.erase(key) == 0) return NotFound("the key " + key + " is not pinned");
  return OkStatus();
}

Result<std::int64_t> EchoService::Prefetch(const LookupRequest& request) {
  return static_cast<std::int64_t>(PromptTokens(request.prompt).size());
}

Result<std::int64_t> EchoService::Evict(const EvictRequest& request) {
  if (request.key == "unknown") return NotFound("no entry has the key " + request.key);
  return request.host && request.cold ? 2 : 1;
}

Result<std::vector<Entry>> EchoService::Entries(const EntriesRequest& request) {
  if (request.key == "unknown") return NotFound("no entry has the key " + request.key);
  std::vector<Entry> entries;
  for (std::int64_t i = 0; i < std::min<std::int64_t>(request.limit, 3); ++i) {
    Entry& entry = entries.emplace_back();
    entry.key = "key" + std::to_string(i);
    entry.tier = i == 0 ? "host" : "host+cold";
    entry.source = "echo";
    entry.start = i * kPage;
    entry.tokens = kPage;
    entry.bytes = 4096;
    entry.pinned = i == 1;
    if (!request.key.empty()) entry.ids = {1, 2, 3};
  }
  return entries;
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
