#include "agentd/service.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>
#include <variant>

#include "agentd/engine/engine.h"
#include "agentd/engine/stats_book.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/pool/page_arena.h"
#include "agentd/system_memory.h"
#include "agentd/tiers/cold_tier.h"
#include "libkvshare/core/status_macros.h"
#include "runtime/utf8.h"

namespace kvshare::agentd {
namespace {

// Bounds on what a request may carry besides its prompt; far above any honest use.
constexpr std::size_t kMaxNameBytes = 256;
constexpr std::size_t kMaxStops = 64;
constexpr std::size_t kMaxStopBytes = 1024;

// Of the memory that is free at start, the part the pool takes when nobody says how much.
constexpr std::int64_t kDefaultPoolDivisor = 4;
// Of a device's, the part that stays for what steps take: a step that finds none is a device that has failed.
constexpr std::int64_t kStepMemoryDivisor = 8;

// A pin may stay as long as anybody could mean.
constexpr std::chrono::milliseconds kMaxPinTtl = std::chrono::hours(24 * 365);

constexpr std::int64_t kMaxEntries = 10000;

ColdStats ColdStatsOf(const ColdTier& cold) {
  const ColdTierStats tier = cold.stats();
  return {.entries = tier.entries,
          .bytes = tier.disk_bytes,
          .hits = tier.hits,
          .misses = tier.misses,
          .integrity_errors = tier.integrity_errors,
          .capacity_bytes = tier.capacity_bytes,
          .stores = tier.stores,
          .dropped = tier.dropped,
          .evictions = tier.evictions,
          .read_bytes = tier.read_bytes,
          .written_bytes = tier.written_bytes,
          .state = tier.degraded.empty() ? "ok" : tier.degraded};
}

// Of what may be used on disk, the part that is for anchors.
constexpr std::int64_t AnchorBytes(std::int64_t cold_bytes) { return cold_bytes / 16; }
// Of which so many are left for pages.
constexpr std::int64_t LeastColdBytes(std::int64_t page_bytes) { return page_bytes + (page_bytes - 1) / 15; }

// All requests share one scope until a daemon serves several tenants.
Digest DefaultScope() { return DigestBuilder("scope").Text("default").Finish(); }

// Names stand in statistics and logs, and whoever reads those should be able to trust a line to be a line.
Status CheckNames(const std::string& agent, const std::string& session) {
  for (const auto& [field, name] : {std::pair("agent", &agent), std::pair("session", &session)}) {
    if (name->size() > kMaxNameBytes) {
      return InvalidArgument(std::string("the name in `") + field + "` is longer than " +
                             std::to_string(kMaxNameBytes) + " bytes");
    }
    const bool has_control =
        std::any_of(name->begin(), name->end(), [](unsigned char c) { return c < ' ' || c == 127; });
    if (has_control || !runtime::IsValidUtf8(*name)) {
      return InvalidArgument(std::string("the name in `") + field + "` is not printable UTF-8");
    }
  }
  return OkStatus();
}

Status CheckTtl(std::chrono::milliseconds ttl, std::chrono::milliseconds least, std::chrono::milliseconds most) {
  if (ttl >= least && ttl <= most) return OkStatus();
  return InvalidArgument("ttl is " + std::to_string(ttl.count()) + " ms; it must be from " +
                         std::to_string(least.count()) + " to " + std::to_string(most.count()) + " ms");
}

Status CheckParameters(const GenerateRequest& request) {
  const SamplingParams& s = request.sampling;
  if (request.max_tokens < 0) {
    return InvalidArgument("max_tokens is " + std::to_string(request.max_tokens) +
                           "; it must be at least 0 (0: store the prompt's KV and generate nothing)");
  }
  if (!std::isfinite(s.temperature) || s.temperature < 0) {
    return InvalidArgument("temperature must be a number of at least 0");
  }
  if (s.top_k < 0) return InvalidArgument("top_k is " + std::to_string(s.top_k) + "; it must be at least 0 (no limit)");
  if (!(s.top_p > 0 && s.top_p <= 1)) return InvalidArgument("top_p must be over 0 and at most 1");
  if (request.timeout <= std::chrono::milliseconds::zero()) return InvalidArgument("timeout must be over 0");
  if (request.stop.size() > kMaxStops) {
    return InvalidArgument("there are " + std::to_string(request.stop.size()) + " stop strings; at most " +
                           std::to_string(kMaxStops) + " are allowed");
  }
  for (const std::string& stop : request.stop) {
    if (stop.empty()) return InvalidArgument("a stop string is empty");
    if (stop.size() > kMaxStopBytes) {
      return InvalidArgument("a stop string is longer than " + std::to_string(kMaxStopBytes) + " bytes");
    }
  }
  return CheckNames(request.agent, request.session);
}

class ServiceImpl final : public Service {
 public:
  ServiceImpl(std::unique_ptr<runtime::Model> model, std::unique_ptr<PageArena> arena, std::unique_ptr<ColdTier> cold,
              const std::string& cold_missing, KvPoolOptions pool_options, const LeaseLimits& leases,
              const ServiceOptions& options)
      : model_(std::move(model)),
        options_(options),
        arena_(std::move(arena)),
        cold_(std::move(cold)),
        cold_missing_(cold_missing),
        pool_(arena_->pages().num_pages, RootContext(model_->space(), DefaultScope()), std::move(pool_options)),
        engine_(model_.get(), &pool_, arena_.get(), cold_.get(), &stats_,
                {.max_running = std::min(options.max_running, model_->max_batch_rows()),
                 .max_waiting = options.max_waiting,
                 .prefill_chunk_tokens = options.prefill_chunk_tokens,
                 .always_load = options.always_load,
                 .load_in_parts = options.load_in_parts,
                 .seconds_per_token = options.seconds_per_token,
                 .moved = {.blend_recompute = options.blend_recompute,
                           .blend_gradual = options.blend_gradual,
                           .anchor_dir = cold_ == nullptr ? "" : options.cold_dir + "/anchors",
                           .anchor_bytes = AnchorBytes(options.cold_bytes),
                           .anchor_memory = options.anchor_memory},
                 .leases = leases,
                 .on_device_lost = options.on_device_lost,
                 .after_device_loss = options.after_device_loss}) {}

  std::vector<std::string> Warnings() const override {
    std::vector<std::string> warnings = engine_.Warnings();
    if (!cold_missing_.empty()) {
      warnings.push_back("nothing is kept on disk or found there until the next start: " + cold_missing_);
    }
    const auto pool_bytes = static_cast<std::int64_t>(arena_->pages().num_pages) *
                            static_cast<std::int64_t>(model_->kv_layout().page_bytes());
    const std::int64_t available = AvailableMemoryBytes();
    if (model_->backend().capabilities().host_memory && pool_bytes > available) {
      warnings.push_back("the KV pool may grow to " + std::to_string(pool_bytes) + " bytes, and this machine has " +
                         std::to_string(available) + " free: it may end this process when it has no more");
    }
    return warnings;
  }

  SharedPages Shared() const override {
    const kernels::KvPages& pages = arena_->pages();
    const kernels::KvLayout& layout = pages.layout;
    SharedPages shared;
    shared.layout = {.num_layers = static_cast<int>(layout.num_layers),
                     .num_kv_heads = static_cast<int>(layout.num_kv_heads),
                     .head_dim = static_cast<int>(layout.head_dim),
                     .page_tokens = static_cast<int>(kernels::kPageTokens),
                     .page_bytes = static_cast<std::int64_t>(layout.page_bytes()),
                     .dtype = std::string(kernels::DTypeName(layout.dtype))};
    if (!arena_->in_place()) return shared;
    shared.memory = pages.base;
    shared.generations = arena_->generations();
    shared.num_pages = pages.num_pages;
    shared.memory_fd = arena_->memory_fd();
    shared.generations_fd = arena_->generations_fd();
    return shared;
  }

  ServerInfo Info() const override {
    ServerInfo info;
    info.version = KVSHARE_VERSION;
    info.model = model_->config().name;
    info.space = model_->space().Hex();
    info.dtype = kernels::DTypeName(model_->kv_layout().dtype);
    info.isa = model_->backend().capabilities().isa;
    info.device = model_->backend().capabilities().device;
    info.reuse = options_.reuse;
    info.max_context_tokens = model_->config().max_positions;
    info.vocab_size = model_->config().vocab_size;
    return info;
  }

  Result<std::vector<TokenId>> Tokenize(std::string_view text) const override {
    if (model_->tokenizer() == nullptr) return NoTokenizer();
    return model_->tokenizer()->Encode(text);
  }

  Result<std::string> Detokenize(std::span<const TokenId> ids) const override {
    if (model_->tokenizer() == nullptr) return NoTokenizer();
    KVS_RETURN_IF_ERROR(CheckIds(ids, model_->config().vocab_size));
    return model_->tokenizer()->Decode(ids);
  }

  Result<RenderReply> Render(const RenderRequest& request) const override {
    if (model_->tokenizer() == nullptr) return NoTokenizer();
    if (model_->chat_template() == nullptr) {
      return InvalidArgument("the model " + model_->config().name +
                             " has no chat template; send the prompt as text or as ids");
    }
    RenderReply reply;
    KVS_ASSIGN_OR_RETURN(reply.prompt,
                         model_->chat_template()->Render(request.chat.messages_json, request.chat.tools_json,
                                                         request.chat.add_generation_prompt));
    reply.ids = model_->tokenizer()->Encode(reply.prompt);
    return reply;
  }

  Result<std::uint64_t> Generate(const GenerateRequest& request, std::shared_ptr<GenerateSink> sink) override {
    EngineRequest admitted;
    admitted.arrival = std::chrono::steady_clock::now();
    KVS_RETURN_IF_ERROR(CheckParameters(request));
    if (!request.stop.empty() && model_->tokenizer() == nullptr) {
      return NoTokenizer().WithContext("stop strings cannot be found");
    }
    KVS_ASSIGN_OR_RETURN(admitted.prompt, ResolvePrompt(request.prompt));
    const std::int64_t window = model_->config().max_positions;
    admitted.sampling = request.sampling;
    admitted.max_tokens =
        std::min<std::int64_t>(request.max_tokens, window - static_cast<std::int64_t>(admitted.prompt.size()));
    admitted.stop = request.stop;
    admitted.ignore_eos = request.ignore_eos;
    admitted.agent = stats_.Intern(request.agent);
    if (!request.session.empty()) admitted.session = std::make_shared<const std::string>(request.session);
    admitted.reuse = request.reuse.value_or(options_.reuse);
    admitted.exact_agent = IsExactAgent(request.agent);
    // A year is forever, and added to now it does not overflow the clock.
    admitted.deadline =
        admitted.arrival + std::min<std::chrono::milliseconds>(request.timeout, std::chrono::hours(24 * 365));
    admitted.sink = std::move(sink);
    return engine_.Submit(std::move(admitted));
  }

  void Cancel(std::uint64_t request_id) override { engine_.Cancel(request_id); }

  Result<Explanation> Explain(const kvshare::ExplainRequest& request) override {
    if (request.request_id != 0) return engine_.ExplainRequest(request.request_id);
    KVS_RETURN_IF_ERROR(CheckNames(request.agent, request.session));
    KVS_ASSIGN_OR_RETURN(const std::vector<TokenId> prompt, ResolvePrompt(request.prompt));
    return engine_.Explain(prompt, request.reuse.value_or(options_.reuse), IsExactAgent(request.agent),
                           request.session.empty() ? nullptr : &request.session);
  }

  Stats GetStats() const override {
    Stats stats = stats_.Snapshot();
    stats.anchors = engine_.anchor_stats();
    stats.cold.state = cold_missing_;
    if (cold_ == nullptr) return stats;
    stats.cold = ColdStatsOf(*cold_);
    stats.cold.bytes += stats.anchors.disk_bytes;
    stats.cold.capacity_bytes += stats.anchors.disk_capacity_bytes;
    return stats;
  }

  Result<Match> Lookup(const LookupRequest& request) override {
    KVS_RETURN_IF_ERROR(CheckNames(request.agent, request.session));
    KVS_ASSIGN_OR_RETURN(const std::vector<TokenId> prompt, ResolvePrompt(request.prompt));
    return engine_.Lookup(prompt, request.session.empty() ? nullptr : &request.session);
  }

  Result<LeaseInfo> Acquire(const AcquireRequest& request) override {
    KVS_RETURN_IF_ERROR(CheckNames(request.agent, request.session));
    KVS_RETURN_IF_ERROR(CheckTtl(request.ttl, std::chrono::milliseconds(1), options_.max_lease_ttl));
    KVS_ASSIGN_OR_RETURN(const std::vector<TokenId> prompt, ResolvePrompt(request.prompt));
    return engine_.Acquire(prompt, request.ttl);
  }

  Status Release(std::uint64_t lease) override { return engine_.Release(lease); }

  Result<PinInfo> Pin(const PinRequest& request) override {
    KVS_RETURN_IF_ERROR(CheckTtl(request.ttl, std::chrono::milliseconds(0), kMaxPinTtl));
    KVS_ASSIGN_OR_RETURN(const std::vector<TokenId> prompt, ResolvePrompt(request.prompt));
    return engine_.Pin(prompt, request.ttl);
  }

  Status Unpin(const std::string& key) override { return engine_.Unpin(key); }

  Result<std::int64_t> Prefetch(const LookupRequest& request) override {
    KVS_RETURN_IF_ERROR(CheckNames(request.agent, request.session));
    KVS_ASSIGN_OR_RETURN(const std::vector<TokenId> prompt, ResolvePrompt(request.prompt));
    return engine_.Prefetch(prompt);
  }

  Result<std::int64_t> Evict(const EvictRequest& request) override { return engine_.Evict(request); }

  Result<std::vector<Entry>> Entries(const EntriesRequest& request) override {
    if (request.limit < 1 || request.limit > kMaxEntries) {
      return InvalidArgument("limit is " + std::to_string(request.limit) + "; it must be from 1 to " +
                             std::to_string(kMaxEntries));
    }
    return engine_.Entries(request);
  }

  void ClearPool() override { engine_.ClearPool(); }
  void Drain() override { engine_.Drain(); }
  Status CheckIntegrity() override { return engine_.CheckIntegrity(); }

 private:
  bool IsExactAgent(const std::string& agent) const {
    const auto same = [](unsigned char a, unsigned char b) { return std::tolower(a) == std::tolower(b); };
    return std::any_of(options_.exact_agents.begin(), options_.exact_agents.end(), [&](const std::string& word) {
      return std::search(agent.begin(), agent.end(), word.begin(), word.end(), same) != agent.end();
    });
  }

  Status NoTokenizer() const {
    return InvalidArgument("the model " + model_->config().name + " was loaded without a tokenizer; send ids");
  }

  static Status CheckIds(std::span<const TokenId> ids, std::int64_t vocab_size) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] >= vocab_size) {
        return InvalidArgument("id " + std::to_string(ids[i]) + " at index " + std::to_string(i) +
                               " is outside the vocabulary of " + std::to_string(vocab_size) + " tokens");
      }
    }
    return OkStatus();
  }

  // The prompt's ids, checked against vocabulary and window.
  Result<std::vector<TokenId>> ResolvePrompt(const Prompt& prompt) const {
    std::vector<TokenId> ids;
    if (const auto* tokens = std::get_if<TokenPrompt>(&prompt)) {
      ids = tokens->ids;
    } else if (const auto* text = std::get_if<TextPrompt>(&prompt)) {
      KVS_ASSIGN_OR_RETURN(ids, Tokenize(text->text));
    } else {
      KVS_ASSIGN_OR_RETURN(RenderReply rendered, Render({.chat = std::get<ChatPrompt>(prompt)}));
      ids = std::move(rendered.ids);
    }
    if (ids.empty()) return InvalidArgument("the prompt is empty; it must have at least one token");
    KVS_RETURN_IF_ERROR(CheckIds(ids, model_->config().vocab_size));
    const std::int64_t window = model_->config().max_positions;
    if (static_cast<std::int64_t>(ids.size()) + 1 > window) {
      return InvalidArgument("the prompt has " + std::to_string(ids.size()) + " tokens; the model's window is " +
                             std::to_string(window) + " tokens, of which one at least is for the answer");
    }
    return ids;
  }

  // In this order: the engine, made last, ends first.
  const std::unique_ptr<runtime::Model> model_;
  const ServiceOptions options_;
  StatsBook stats_;
  const std::unique_ptr<PageArena> arena_;
  const std::unique_ptr<ColdTier> cold_;  // null: none
  const std::string cold_missing_;        // why, where one was wanted
  KvPool pool_;
  Engine engine_;
};

std::int64_t ContextPages(const runtime::Model& model) {
  return (model.config().max_positions + kPageTokens - 1) / kPageTokens;
}

// Pages of a pool for this model. ResourceExhausted when they do not hold one full context: then some request that fits
// the window could never run.
Result<kernels::PageIndex> PoolPages(const runtime::Model& model, std::int64_t pool_bytes) {
  const auto page_bytes = static_cast<std::int64_t>(model.kv_layout().page_bytes());
  const std::int64_t context_pages = ContextPages(model);
  const std::int64_t context_bytes = context_pages * page_bytes;
  const bool host = model.backend().capabilities().host_memory;
  const std::int64_t available =
      host ? AvailableMemoryBytes() : static_cast<std::int64_t>(model.backend().free_bytes());
  if (pool_bytes == 0) {
    pool_bytes = std::max(available / kDefaultPoolDivisor, context_bytes);
    if (pool_bytes > available) {
      return ResourceExhausted("one full context of " + std::to_string(model.config().max_positions) +
                               " tokens takes " + std::to_string(context_bytes) + " bytes of KV, and " +
                               (host ? "this machine" : "the device") + " has " + std::to_string(available) +
                               " bytes free");
    }
  }
  if (const std::int64_t most = available - available / kStepMemoryDivisor; !host && pool_bytes > most) {
    return ResourceExhausted("a KV pool of " + std::to_string(pool_bytes) +
                             " bytes leaves too little of the device's " + std::to_string(available) +
                             " free bytes to compute with; give it at most " + std::to_string(most) + " bytes");
  }
  if (pool_bytes < context_bytes) {
    return ResourceExhausted("a KV pool of " + std::to_string(pool_bytes) +
                             " bytes does not hold one full context of " +
                             std::to_string(model.config().max_positions) + " tokens; give it at least " +
                             std::to_string(context_bytes) + " bytes");
  }
  const std::int64_t pages = std::min<std::int64_t>(pool_bytes / page_bytes, kNoPage - 1);
  return static_cast<kernels::PageIndex>(pages);
}

}  // namespace

Result<std::unique_ptr<Service>> NewService(std::unique_ptr<runtime::Model> model, const ServiceOptions& options) {
  std::unique_ptr<ColdTier> cold;
  if (!options.cold_dir.empty()) {
    ColdTierOptions tier;
    tier.directory = options.cold_dir;
    tier.max_bytes = options.cold_bytes - AnchorBytes(options.cold_bytes);
    tier.space = model->space();
    tier.page_bytes = model->kv_layout().page_bytes();
    if (const std::int64_t least = ColdTier::LeastBytes(tier.page_bytes); tier.max_bytes < least) {
      return InvalidArgument("--cold-size: " + std::to_string(options.cold_bytes) +
                             " bytes on disk are too few: at least " + std::to_string(LeastColdBytes(least)) +
                             " for this model");
    }
    auto opened = ColdTier::Open(tier);
    // A disk that is full or fails keeps nobody from being served; whoever looks is told.
    if (opened.status().code() == StatusCode::kUnavailable) {
      return NewServiceOn(std::move(model), nullptr, options, opened.status().message());
    }
    KVS_ASSIGN_OR_RETURN(cold, std::move(opened));
  }
  return NewServiceOn(std::move(model), std::move(cold), options);
}

Result<std::unique_ptr<Service>> NewServiceOn(std::unique_ptr<runtime::Model> model, std::unique_ptr<ColdTier> cold,
                                              const ServiceOptions& options, const std::string& cold_missing) {
  for (const auto& [name, value] :
       {std::pair("max_running", options.max_running), std::pair("max_waiting", options.max_waiting),
        std::pair("prefill_chunk_tokens", options.prefill_chunk_tokens)}) {
    if (value < 1) {
      return InvalidArgument(std::string(name) + " is " + std::to_string(value) + "; it must be at least 1");
    }
  }
  if (const auto& share = options.blend_recompute; share.has_value() && !(*share >= 0 && *share <= 1)) {
    return InvalidArgument("blend_recompute is " + std::to_string(*share) + "; it must be from 0 to 1");
  }
  if (options.anchor_memory < 0) return InvalidArgument("anchor_memory is negative");
  if (options.kv_pool_bytes < 0) return InvalidArgument("kv_pool_bytes is negative");
  if (options.max_leases < 0 || options.max_pins < 0) return InvalidArgument("max_leases or max_pins is negative");
  KVS_ASSIGN_OR_RETURN(const kernels::PageIndex pages, PoolPages(*model, options.kv_pool_bytes));
  KvPoolOptions pool;
  if (!options.eviction_policy.empty()) {
    KVS_ASSIGN_OR_RETURN(pool.policy, NewEvictionPolicy(options.eviction_policy, pages));
  }
  // Whatever clients hold, one full context can be computed: else a request could wait for ever.
  const auto spare = static_cast<PageIndex>(pages - ContextPages(*model));
  pool.max_retained = std::min(pages / 2, spare);
  const LeaseLimits leases = {.max_leases = options.max_leases, .max_pins = options.max_pins, .max_pages = spare};
  KVS_ASSIGN_OR_RETURN(auto arena, PageArena::Create(model->backend(), model->kv_layout(), pages));
  pool.generations = arena->generations();
  return std::unique_ptr<Service>(std::make_unique<ServiceImpl>(std::move(model), std::move(arena), std::move(cold),
                                                                cold_missing, std::move(pool), leases, options));
}

}  // namespace kvshare::agentd
