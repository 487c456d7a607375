#include "tests/testing/random_messages.h"

#include <sstream>
#include <utility>
#include <variant>

namespace kvshare::testing {
namespace {

using Rng = std::mt19937_64;

std::uint64_t Below(Rng& rng, std::uint64_t n) { return std::uniform_int_distribution<std::uint64_t>(0, n - 1)(rng); }

// Any bytes: the wire does not care what a text holds, zero bytes included.
std::string RandomString(Rng& rng, std::size_t max_bytes) {
  std::string text(Below(rng, max_bytes + 1), '\0');
  for (char& c : text) c = static_cast<char>(Below(rng, 256));
  return text;
}

std::vector<TokenId> RandomIds(Rng& rng) {
  std::vector<TokenId> ids(Below(rng, 50));
  for (TokenId& id : ids) id = static_cast<TokenId>(rng());
  return ids;
}

std::int64_t RandomCount(Rng& rng) { return static_cast<std::int64_t>(rng()); }

double RandomNumber(Rng& rng) { return std::uniform_real_distribution<double>(-1e6, 1e6)(rng); }

ChatPrompt RandomChat(Rng& rng) {
  return {.messages_json = RandomString(rng, 200),
          .tools_json = RandomString(rng, 100),
          .add_generation_prompt = Below(rng, 2) == 0};
}

Prompt RandomPrompt(Rng& rng) {
  switch (Below(rng, 3)) {
    case 0: return TextPrompt{RandomString(rng, 200)};
    case 1: return TokenPrompt{RandomIds(rng)};
    default: return RandomChat(rng);
  }
}

std::optional<ReuseMode> RandomReuse(Rng& rng) {
  switch (Below(rng, 3)) {
    case 0: return std::nullopt;
    case 1: return ReuseMode::kOff;
    default: return ReuseMode::kExact;
  }
}

ServerInfo RandomInfo(Rng& rng) {
  return {.version = RandomString(rng, 20),
          .model = RandomString(rng, 256),
          .space = RandomString(rng, 64),
          .dtype = RandomString(rng, 10),
          .isa = RandomString(rng, 10),
          .reuse = Below(rng, 2) == 0 ? ReuseMode::kOff : ReuseMode::kExact,
          .max_context_tokens = RandomCount(rng),
          .vocab_size = RandomCount(rng),
          .device = RandomString(rng, 10)};
}

ReuseTotals RandomTotals(Rng& rng) {
  return {.requests = RandomCount(rng),
          .prompt_tokens = RandomCount(rng),
          .prefix_tokens = RandomCount(rng),
          .moved_tokens = RandomCount(rng),
          .recomputed_tokens = RandomCount(rng),
          .fresh_tokens = RandomCount(rng),
          .generated_tokens = RandomCount(rng)};
}

std::vector<MissReason> RandomMissReasons(Rng& rng) {
  std::vector<MissReason> reasons(Below(rng, 5));
  for (MissReason& reason : reasons) reason = {RandomString(rng, 30), RandomCount(rng)};
  return reasons;
}

codec::Generate RandomGenerate(Rng& rng) {
  codec::Generate generate;
  GenerateRequest& request = generate.request;
  request.prompt = RandomPrompt(rng);
  request.sampling = {.temperature = static_cast<float>(RandomNumber(rng)),
                      .top_k = static_cast<int>(rng()),
                      .top_p = static_cast<float>(RandomNumber(rng)),
                      .seed = rng()};
  request.max_tokens = static_cast<int>(rng());
  for (std::uint64_t i = Below(rng, 4); i > 0; --i) request.stop.push_back(RandomString(rng, 40));
  request.ignore_eos = Below(rng, 2) == 0;
  request.agent = RandomString(rng, 256);
  request.session = RandomString(rng, 256);
  request.reuse = RandomReuse(rng);
  request.timeout = std::chrono::milliseconds(Below(rng, wire::kMaxTimeoutMs));
  generate.credit = static_cast<std::uint32_t>(Below(rng, wire::kMaxCredit + 1));
  return generate;
}

GenerateReply RandomDone(Rng& rng) {
  return {.request_id = rng(),
          .ids = RandomIds(rng),
          .text = RandomString(rng, 200),
          .finish_reason = Below(rng, 2) == 0 ? FinishReason::kStop : FinishReason::kLength,
          .prompt_tokens = RandomCount(rng),
          .reuse = {.prefix_tokens = RandomCount(rng),
                    .moved_tokens = RandomCount(rng),
                    .recomputed_tokens = RandomCount(rng),
                    .fresh_tokens = RandomCount(rng),
                    .approximate = Below(rng, 2) == 0,
                    .miss_reasons = RandomMissReasons(rng)},
          .timings = {.queue_ms = RandomNumber(rng),
                      .ttft_ms = RandomNumber(rng),
                      .prompt_ms = RandomNumber(rng),
                      .predicted_ms = RandomNumber(rng)}};
}

Explanation RandomExplanation(Rng& rng) {
  Explanation explanation;
  for (std::uint64_t i = Below(rng, 6); i > 0; --i) {
    explanation.spans.push_back({.kind = RandomString(rng, 6),
                                 .start = RandomCount(rng),
                                 .length = RandomCount(rng),
                                 .source = RandomString(rng, 20),
                                 .tier = RandomString(rng, 5),
                                 .repair = RandomString(rng, 5),
                                 .miss_reason = RandomString(rng, 20)});
  }
  return explanation;
}

Histogram RandomHistogram(Rng& rng) {
  Histogram histogram{.sum = RandomNumber(rng)};
  if (Below(rng, 3) == 0) return histogram;
  for (std::uint64_t i = Below(rng, 6); i > 0; --i) histogram.bounds.push_back(RandomNumber(rng));
  for (std::size_t i = 0; i <= histogram.bounds.size(); ++i) histogram.counts.push_back(RandomCount(rng));
  return histogram;
}

Stats RandomStats(Rng& rng) {
  Stats stats;
  stats.totals = RandomTotals(rng);
  stats.pool = {.capacity_bytes = RandomCount(rng),
                .used_bytes = RandomCount(rng),
                .pages = RandomCount(rng),
                .leases = RandomCount(rng),
                .evictions = RandomCount(rng)};
  stats.cold = {.entries = RandomCount(rng),
                .bytes = RandomCount(rng),
                .hits = RandomCount(rng),
                .misses = RandomCount(rng),
                .integrity_errors = RandomCount(rng),
                .capacity_bytes = RandomCount(rng),
                .stores = RandomCount(rng),
                .dropped = RandomCount(rng),
                .evictions = RandomCount(rng),
                .read_bytes = RandomCount(rng),
                .written_bytes = RandomCount(rng),
                .state = RandomString(rng, 40)};
  stats.approximate = {.answers = RandomCount(rng),
                       .sent_back = RandomCount(rng),
                       .healed = RandomCount(rng),
                       .kept_bytes = RandomCount(rng),
                       .guard_margin = RandomNumber(rng),
                       .guard_margin_elsewhere = RandomNumber(rng),
                       .moved_row = RandomNumber(rng)};
  stats.approximate.shadow_audits = {
      .audits = RandomCount(rng), .failures = RandomCount(rng), .kl_sum = RandomNumber(rng)};
  for (auto* audits : {&stats.approximate.audits, &stats.approximate.later_audits}) {
    for (std::uint64_t i = Below(rng, 5); i > 0; --i) {
      audits->push_back({.audits = RandomCount(rng), .failures = RandomCount(rng), .kl_sum = RandomNumber(rng)});
    }
  }
  stats.anchors = {.bytes = RandomCount(rng),
                   .disk_bytes = RandomCount(rng),
                   .disk_capacity_bytes = RandomCount(rng),
                   .saved = RandomCount(rng),
                   .loaded = RandomCount(rng),
                   .dropped = RandomCount(rng)};
  for (const char* reason : {"damaged", "other_space"}) {
    if (Below(rng, 2) == 0) stats.anchors.misses[reason] = RandomCount(rng);
  }
  stats.pinned_bytes = RandomCount(rng);
  stats.client_leases = RandomCount(rng);
  stats.uptime_s = RandomNumber(rng);
  stats.ttft_seconds = RandomHistogram(rng);
  stats.queue_seconds = RandomHistogram(rng);
  stats.prefill_seconds = RandomHistogram(rng);
  stats.inter_token_seconds = RandomHistogram(rng);
  stats.requests_running = RandomCount(rng);
  stats.requests_waiting = RandomCount(rng);
  stats.requests_failed = RandomCount(rng);
  for (const MissReason& reason : RandomMissReasons(rng)) stats.miss_reasons[reason.reason] = reason.tokens;
  for (std::uint64_t i = Below(rng, 5); i > 0; --i) stats.agents[RandomString(rng, 30)] = RandomTotals(rng);
  return stats;
}

KvLayoutInfo RandomLayout(Rng& rng) {
  return {.num_layers = static_cast<int>(Below(rng, 100)),
          .num_kv_heads = static_cast<int>(Below(rng, 100)),
          .head_dim = static_cast<int>(Below(rng, 300)),
          .page_tokens = static_cast<int>(Below(rng, 100)),
          .page_bytes = static_cast<std::int64_t>(Below(rng, 1 << 30)),
          .dtype = RandomString(rng, 10)};
}

LeaseInfo RandomLease(Rng& rng) {
  LeaseInfo lease{.id = rng(),
                  .tokens = static_cast<std::int64_t>(Below(rng, 1 << 20)),
                  .ttl = std::chrono::milliseconds(Below(rng, wire::kMaxTimeoutMs)),
                  .layout = RandomLayout(rng)};
  for (std::uint64_t i = Below(rng, 6); i > 0; --i) {
    lease.pages.push_back({.offset = static_cast<std::int64_t>(Below(rng, std::uint64_t{1} << 62)),
                           .start = static_cast<std::int64_t>(Below(rng, 1 << 20)),
                           .valid_tokens = static_cast<int>(Below(rng, 65)),
                           .generation = rng()});
  }
  return lease;
}

codec::EntryList RandomEntries(Rng& rng) {
  codec::EntryList list;
  for (std::uint64_t i = Below(rng, 5); i > 0; --i) {
    list.entries.push_back({.key = RandomString(rng, 64),
                            .parent = RandomString(rng, 64),
                            .tier = RandomString(rng, 9),
                            .source = RandomString(rng, 20),
                            .start = RandomCount(rng),
                            .tokens = RandomCount(rng),
                            .bytes = RandomCount(rng),
                            .hits = RandomCount(rng),
                            .idle_ms = RandomCount(rng),
                            .leases = RandomCount(rng),
                            .pinned = Below(rng, 2) == 0,
                            .ids = RandomIds(rng)});
  }
  return list;
}

codec::HelloAck RandomHelloAck(Rng& rng) {
  codec::HelloAck ack{.info = RandomInfo(rng),
                      .max_frame_bytes = rng(),
                      .limits = {.text_bytes = rng(), .tokens = rng(), .name_bytes = rng(), .streams = rng()},
                      .protocol_version = static_cast<std::uint16_t>(rng()),
                      .hash_version = static_cast<std::uint32_t>(rng()),
                      .layout = RandomLayout(rng),
                      .memory_socket = RandomString(rng, wire::kMaxPathBytes)};
  for (std::uint64_t i = Below(rng, wire::kMaxTicketBytes); i > 0; --i) {
    ack.memory_ticket.push_back(static_cast<std::uint8_t>(rng()));
  }
  return ack;
}

LookupRequest RandomLookup(Rng& rng) {
  return {.prompt = RandomPrompt(rng), .agent = RandomString(rng, 256), .session = RandomString(rng, 256)};
}

std::chrono::milliseconds RandomTtl(Rng& rng) { return std::chrono::milliseconds(Below(rng, wire::kMaxTimeoutMs)); }

// ---- descriptions ----

struct Describer {
  std::ostringstream out;

  Describer() { out << std::hexfloat; }

  void Add(const std::string& text) { out << text.size() << ':' << text << ' '; }
  void Add(const std::vector<TokenId>& ids) {
    out << ids.size() << "ids:";
    for (TokenId id : ids) out << id << ' ';
  }
  void Add(std::optional<ReuseMode> mode) { out << (mode.has_value() ? static_cast<int>(*mode) : -1) << ' '; }
  void Add(const ChatPrompt& chat) {
    Add(chat.messages_json);
    Add(chat.tools_json);
    out << chat.add_generation_prompt << ' ';
  }
  void Add(const Prompt& prompt) {
    out << "prompt" << prompt.index() << ' ';
    if (const auto* text = std::get_if<TextPrompt>(&prompt)) Add(text->text);
    if (const auto* tokens = std::get_if<TokenPrompt>(&prompt)) Add(tokens->ids);
    if (const auto* chat = std::get_if<ChatPrompt>(&prompt)) Add(*chat);
  }
  void Add(const ServerInfo& info) {
    for (const std::string* name : {&info.version, &info.model, &info.space, &info.dtype, &info.isa, &info.device})
      Add(*name);
    Add(std::optional(info.reuse));
    out << info.max_context_tokens << ' ' << info.vocab_size << ' ';
  }
  void Add(const ReuseTotals& t) {
    out << t.requests << ' ' << t.prompt_tokens << ' ' << t.prefix_tokens << ' ' << t.moved_tokens << ' '
        << t.recomputed_tokens << ' ' << t.fresh_tokens << ' ' << t.generated_tokens << ' ';
  }
  void Add(const MissReason& reason) {
    Add(reason.reason);
    out << reason.tokens << ' ';
  }

  void operator()(const codec::Hello& hello) { Add(hello.client); }
  void operator()(const codec::Ping&) {}
  void operator()(const codec::Tokenize& tokenize) { Add(tokenize.text); }
  void operator()(const codec::Detokenize& detokenize) { Add(detokenize.ids); }
  void operator()(const RenderRequest& render) { Add(render.chat); }
  void operator()(const codec::Generate& generate) {
    const GenerateRequest& r = generate.request;
    Add(r.prompt);
    out << r.sampling.temperature << ' ' << r.sampling.top_k << ' ' << r.sampling.top_p << ' ' << r.sampling.seed << ' '
        << r.max_tokens << ' ' << r.stop.size() << ' ';
    for (const std::string& stop : r.stop) Add(stop);
    out << r.ignore_eos << ' ';
    Add(r.agent);
    Add(r.session);
    Add(r.reuse);
    out << r.timeout.count() << ' ' << generate.credit;
  }
  void operator()(const codec::Cancel& cancel) { out << cancel.target; }
  void operator()(const ExplainRequest& explain) {
    Add(explain.prompt);
    out << explain.request_id << ' ';
    Add(explain.agent);
    Add(explain.session);
    Add(explain.reuse);
  }
  void operator()(const codec::GetStats&) {}
  void operator()(const codec::Credit& credit) { out << credit.target << ' ' << credit.chunks; }

  void Add(const KvLayoutInfo& layout) {
    out << layout.num_layers << ' ' << layout.num_kv_heads << ' ' << layout.head_dim << ' ' << layout.page_tokens << ' '
        << layout.page_bytes << ' ';
    Add(layout.dtype);
  }
  void Add(const Histogram& histogram) {
    out << histogram.bounds.size() << ' ';
    for (double bound : histogram.bounds) out << bound << ' ';
    out << histogram.counts.size() << ' ';
    for (std::int64_t count : histogram.counts) out << count << ' ';
    out << histogram.sum << ' ';
  }
  void Add(const LookupRequest& lookup) {
    Add(lookup.prompt);
    Add(lookup.agent);
    Add(lookup.session);
  }

  void operator()(const LookupRequest& lookup) { Add(lookup); }
  void operator()(const codec::Prefetch& prefetch) { Add(prefetch.lookup); }
  void operator()(const AcquireRequest& acquire) {
    Add(acquire.prompt);
    Add(acquire.agent);
    Add(acquire.session);
    out << acquire.ttl.count();
  }
  void operator()(const codec::Release& release) { out << release.lease; }
  void operator()(const PinRequest& pin) {
    Add(pin.prompt);
    out << pin.ttl.count();
  }
  void operator()(const codec::Unpin& unpin) { Add(unpin.key); }
  void operator()(const EvictRequest& evict) {
    Add(evict.key);
    out << evict.host << evict.cold;
  }
  void operator()(const EntriesRequest& entries) {
    Add(entries.key);
    out << entries.limit;
  }
  void operator()(const codec::Drain&) {}

  void operator()(const Match& m) {
    out << m.prompt_tokens << ' ' << m.prefix_tokens << ' ' << m.host_tokens << ' ' << m.cold_tokens << ' '
        << m.chunk_tokens;
  }
  void operator()(const LeaseInfo& lease) {
    out << lease.id << ' ' << lease.tokens << ' ' << lease.ttl.count() << ' ';
    Add(lease.layout);
    for (const LeasePage& page : lease.pages) {
      out << page.offset << ' ' << page.start << ' ' << page.valid_tokens << ' ' << page.generation << ' ';
    }
  }
  void operator()(const PinInfo& pin) {
    Add(pin.key);
    out << pin.tokens;
  }
  void operator()(const codec::Count& count) { out << count.count; }
  void operator()(const codec::EntryList& list) {
    for (const Entry& entry : list.entries) {
      for (const std::string* name : {&entry.key, &entry.parent, &entry.tier, &entry.source}) Add(*name);
      out << entry.start << ' ' << entry.tokens << ' ' << entry.bytes << ' ' << entry.hits << ' ' << entry.idle_ms
          << ' ' << entry.leases << ' ' << entry.pinned << ' ';
      Add(entry.ids);
    }
  }
  void operator()(const codec::Ack&) {}

  void operator()(const codec::HelloAck& ack) {
    Add(ack.info);
    out << ack.max_frame_bytes << ' ' << ack.limits.text_bytes << ' ' << ack.limits.tokens << ' '
        << ack.limits.name_bytes << ' ' << ack.limits.streams << ' ' << ack.protocol_version << ' ' << ack.hash_version
        << ' ';
    Add(ack.layout);
    Add(ack.memory_socket);
    Add(std::string(ack.memory_ticket.begin(), ack.memory_ticket.end()));
  }
  void operator()(const codec::Pong& pong) {
    out << pong.info.has_value() << ' ';
    if (pong.info.has_value()) Add(*pong.info);
  }
  void operator()(const codec::Tokens& tokens) { Add(tokens.ids); }
  void operator()(const codec::Text& text) { Add(text.text); }
  void operator()(const RenderReply& rendered) {
    Add(rendered.prompt);
    Add(rendered.ids);
  }
  void operator()(const codec::Accepted& accepted) { out << accepted.request_id; }
  void operator()(const TokenChunk& chunk) {
    Add(chunk.ids);
    Add(chunk.text);
  }
  void operator()(const GenerateReply& reply) {
    out << reply.request_id << ' ';
    Add(reply.ids);
    Add(reply.text);
    out << static_cast<int>(reply.finish_reason) << ' ' << reply.prompt_tokens << ' ' << reply.reuse.prefix_tokens
        << ' ' << reply.reuse.moved_tokens << ' ' << reply.reuse.recomputed_tokens << ' ' << reply.reuse.fresh_tokens
        << ' ' << reply.reuse.approximate << ' ' << reply.reuse.miss_reasons.size() << ' ';
    for (const MissReason& reason : reply.reuse.miss_reasons) Add(reason);
    out << reply.timings.queue_ms << ' ' << reply.timings.ttft_ms << ' ' << reply.timings.prompt_ms << ' '
        << reply.timings.predicted_ms;
  }
  void operator()(const Explanation& explanation) {
    out << explanation.spans.size() << ' ';
    for (const ExplainSpan& span : explanation.spans) {
      for (const std::string* name : {&span.kind, &span.source, &span.tier, &span.repair, &span.miss_reason}) {
        Add(*name);
      }
      out << span.start << ' ' << span.length << ' ';
    }
  }
  void operator()(const Stats& s) {
    Add(s.totals);
    out << s.pool.capacity_bytes << ' ' << s.pool.used_bytes << ' ' << s.pool.pages << ' ' << s.pool.leases << ' '
        << s.pool.evictions << ' ' << s.cold.entries << ' ' << s.cold.bytes << ' ' << s.cold.hits << ' '
        << s.cold.misses << ' ' << s.cold.integrity_errors << ' ' << s.requests_running << ' ' << s.requests_waiting
        << ' ' << s.requests_failed << ' ' << s.miss_reasons.size() << ' ';
    for (const auto& [reason, tokens] : s.miss_reasons) Add(MissReason{reason, tokens});
    const ColdStats& c = s.cold;
    out << c.capacity_bytes << ' ' << c.stores << ' ' << c.dropped << ' ' << c.evictions << ' ' << c.read_bytes << ' '
        << c.written_bytes << ' ' << s.pinned_bytes << ' ' << s.client_leases << ' ' << s.uptime_s << ' ';
    Add(c.state);
    const ApproximateStats& a = s.approximate;
    out << a.answers << ' ' << a.sent_back << ' ' << a.healed << ' ' << a.kept_bytes << ' ' << a.guard_margin << ' '
        << a.guard_margin_elsewhere << ' ' << a.moved_row << ' ' << a.shadow_audits.audits << ' '
        << a.shadow_audits.failures << ' ' << a.shadow_audits.kl_sum << ' ';
    for (const auto* audits : {&a.audits, &a.later_audits}) {
      out << audits->size() << ' ';
      for (const AuditTotals& audit : *audits) {
        out << audit.audits << ' ' << audit.failures << ' ' << audit.kl_sum << ' ';
      }
    }
    const AnchorStats& n = s.anchors;
    out << n.bytes << ' ' << n.disk_bytes << ' ' << n.disk_capacity_bytes << ' ' << n.saved << ' ' << n.loaded << ' '
        << n.dropped << ' ' << n.misses.size() << ' ';
    for (const auto& [reason, times] : n.misses) Add(MissReason{reason, times});
    for (const Histogram* h : {&s.ttft_seconds, &s.queue_seconds, &s.prefill_seconds, &s.inter_token_seconds}) Add(*h);
    out << s.agents.size() << ' ';
    for (const auto& [agent, totals] : s.agents) {
      Add(agent);
      Add(totals);
    }
  }
  void operator()(const Status& status) {
    out << StatusCodeName(status.code()) << ' ';
    Add(status.message());
  }
};

template <typename Message>
std::string DescribeMessage(const Message& message) {
  Describer describer;
  describer.out << message.index() << ' ';
  std::visit(describer, message);
  return std::move(describer).out.str();
}

}  // namespace

codec::Request RandomRequest(std::mt19937_64& rng, std::size_t kind) {
  switch (kind) {
    case 0: return codec::Hello{RandomString(rng, 256)};
    case 1: return codec::Ping{};
    case 2: return codec::Tokenize{RandomString(rng, 300)};
    case 3: return codec::Detokenize{RandomIds(rng)};
    case 4: return RenderRequest{RandomChat(rng)};
    case 5: return RandomGenerate(rng);
    case 6: return codec::Cancel{rng()};
    case 7:
      return ExplainRequest{.prompt = RandomPrompt(rng),
                            .request_id = rng(),
                            .agent = RandomString(rng, 256),
                            .session = RandomString(rng, 256),
                            .reuse = RandomReuse(rng)};
    case 8: return codec::GetStats{};
    case 9: return codec::Credit{rng(), static_cast<std::uint32_t>(Below(rng, wire::kMaxCredit + 1))};
    case 10: return RandomLookup(rng);
    case 11:
      return AcquireRequest{.prompt = RandomPrompt(rng),
                            .agent = RandomString(rng, 256),
                            .session = RandomString(rng, 256),
                            .ttl = RandomTtl(rng)};
    case 12: return codec::Release{rng()};
    case 13: return PinRequest{.prompt = RandomPrompt(rng), .ttl = RandomTtl(rng)};
    case 14: return codec::Unpin{RandomString(rng, 64)};
    case 15: return codec::Prefetch{RandomLookup(rng)};
    case 16: return EvictRequest{.key = RandomString(rng, 64), .host = Below(rng, 2) == 0, .cold = Below(rng, 2) == 0};
    case 17:
      return EntriesRequest{.key = RandomString(rng, 64),
                            .limit = static_cast<std::int64_t>(Below(rng, wire::kMaxEntries + 1))};
    default: return codec::Drain{};
  }
}

codec::Reply RandomReply(std::mt19937_64& rng, std::size_t kind) {
  switch (kind) {
    case 0: return RandomHelloAck(rng);
    case 1: return Below(rng, 2) == 0 ? codec::Pong{} : codec::Pong{RandomInfo(rng)};
    case 2: return codec::Tokens{RandomIds(rng)};
    case 3: return codec::Text{RandomString(rng, 300)};
    case 4: return RenderReply{RandomString(rng, 200), RandomIds(rng)};
    case 5: return codec::Accepted{rng()};
    case 6: return TokenChunk{RandomIds(rng), RandomString(rng, 50)};
    case 7: return RandomDone(rng);
    case 8: return RandomExplanation(rng);
    case 9: return RandomStats(rng);
    case 10: return Status(static_cast<StatusCode>(1 + Below(rng, 10)), RandomString(rng, 200));
    case 11:
      return Match{.prompt_tokens = RandomCount(rng),
                   .prefix_tokens = RandomCount(rng),
                   .host_tokens = RandomCount(rng),
                   .cold_tokens = RandomCount(rng),
                   .chunk_tokens = RandomCount(rng)};
    case 12: return RandomLease(rng);
    case 13: return PinInfo{.key = RandomString(rng, 64), .tokens = RandomCount(rng)};
    case 14: return codec::Count{RandomCount(rng)};
    case 15: return RandomEntries(rng);
    default: return codec::Ack{};
  }
}

std::string Describe(const codec::Request& request) { return DescribeMessage(request); }
std::string Describe(const codec::Reply& reply) { return DescribeMessage(reply); }

}  // namespace kvshare::testing
