#include "agentd/server/metrics.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <utility>
#include <vector>

namespace kvshare::agentd {
namespace {

// clang-format off
constexpr std::string_view kMissReasons[] = {
    "last_token", "never_stored", "messages_changed", "evicted", "disabled", "pool_full", "model_changed",  // exact
    "cold_evicted", "load_slower_than_recompute", "cold_damaged", "cold_unreadable",                        // cold tier
    "repaired", "move_slower_than_recompute", "other_company", "not_trusted", "exact_agent", "quality_guard",  // moved
    "no_anchor", "not_on_device"};
// clang-format on

constexpr std::string_view kAnchorMisses[] = {"damaged", "other_version", "other_space", "other_scope", "unreadable"};

// Of a daemon that has none yet: as the engine has them, so that a series does not change when the model is loaded.
const std::vector<double> kRequestSeconds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
                                             1,     2.5,    5,     10,   25,    50,   100, 250};
const std::vector<double> kTokenSeconds = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5};

using Labels = std::vector<std::pair<std::string_view, std::string_view>>;

AuditTotals Sum(std::span<const AuditTotals> audits) {
  AuditTotals sum;
  for (const AuditTotals& audit : audits) {
    sum.audits += audit.audits;
    sum.failures += audit.failures;
    sum.kl_sum += audit.kl_sum;
  }
  return sum;
}

class Writer {
 public:
  void Family(const char* name, const char* type, const char* help) {
    name_ = name;
    text_ += std::string("# HELP ") + name + " " + help + "\n# TYPE " + name + " " + type + "\n";
  }

  void Sample(double value, const Labels& labels = {}, const char* suffix = "") {
    text_ += name_ + suffix;
    if (!labels.empty()) {
      text_ += '{';
      for (std::size_t i = 0; i < labels.size(); ++i) {
        text_ += (i == 0 ? "" : ",") + std::string(labels[i].first) + "=\"" + Escaped(labels[i].second) + "\"";
      }
      text_ += '}';
    }
    text_ += ' ' + Number(value) + '\n';
  }
  void Sample(std::int64_t value, const Labels& labels = {}, const char* suffix = "") {
    Sample(static_cast<double>(value), labels, suffix);
  }

  void Counter(const char* name, const char* help, std::int64_t value) {
    Family(name, "counter", help);
    Sample(value);
  }
  void Gauge(const char* name, const char* help, double value) {
    Family(name, "gauge", help);
    Sample(value);
  }

  void Distribution(const char* name, const char* help, Histogram histogram, const std::vector<double>& bounds) {
    if (histogram.counts.size() != histogram.bounds.size() + 1) histogram = {bounds, {}, 0};
    histogram.counts.resize(histogram.bounds.size() + 1);
    Family(name, "histogram", help);
    std::int64_t below = 0;
    for (std::size_t i = 0; i < histogram.bounds.size(); ++i) {
      below += histogram.counts[i];
      Sample(below, {{"le", Number(histogram.bounds[i])}}, "_bucket");
    }
    below += histogram.counts.back();
    Sample(below, {{"le", "+Inf"}}, "_bucket");
    Sample(histogram.sum, {}, "_sum");
    Sample(below, {}, "_count");
  }

  std::string Take() { return std::move(text_); }

 private:
  static std::string Escaped(std::string_view value) {
    std::string escaped;
    for (const char c : value) {
      if (c == '\\' || c == '"') escaped += '\\';
      escaped += c == '\n' ? "\\n" : std::string(1, c);
    }
    return escaped;
  }

  // The shortest text that reads back as the value.
  static std::string Number(double value) {
    std::array<char, 32> buffer;
    const auto [end, error] = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
    return {buffer.data(), end};
  }

  std::string text_;
  std::string name_;
};

void Daemon(Writer& out, const MetricsInput& in) {
  out.Family("kvshare_build_info", "gauge", "1; which kvshare this is.");
  out.Sample(std::int64_t{1}, {{"version", in.version}});
  if (in.info.has_value()) {
    out.Family("kvshare_model_info", "gauge", "1; what is served, once it is loaded.");
    out.Sample(std::int64_t{1}, {{"model", in.info->model},
                                 {"space", in.info->space},
                                 {"dtype", in.info->dtype},
                                 {"device", in.info->device},
                                 {"isa", in.info->isa},
                                 {"reuse", ReuseModeName(in.info->reuse)}});
  }
  out.Gauge("kvshare_ready", "1 while requests are accepted.", in.ready ? 1 : 0);
  out.Gauge("kvshare_uptime_seconds", "Since the model began to serve.", in.stats.uptime_s);
}

void Requests(Writer& out, const Stats& stats) {
  out.Family("kvshare_requests_total", "counter", "Generations that ended, by how.");
  out.Sample(stats.totals.requests, {{"code", "ok"}});
  out.Sample(stats.requests_failed, {{"code", "failed"}});
  out.Gauge("kvshare_requests_running", "Generations under way.", static_cast<double>(stats.requests_running));
  out.Gauge("kvshare_requests_waiting", "Generations that wait.", static_cast<double>(stats.requests_waiting));
  out.Distribution("kvshare_queue_seconds", "From a request's arrival to its first computation.", stats.queue_seconds,
                   kRequestSeconds);
  out.Distribution("kvshare_prefill_seconds", "Computing or loading a request's prompt.", stats.prefill_seconds,
                   kRequestSeconds);
  out.Distribution("kvshare_time_to_first_token_seconds", "From a request's arrival to its first generated token.",
                   stats.ttft_seconds, kRequestSeconds);
  out.Distribution("kvshare_inter_token_seconds", "A request's mean time between generated tokens.",
                   stats.inter_token_seconds, kTokenSeconds);
}

void Tokens(Writer& out, const Stats& stats) {
  const ReuseTotals& totals = stats.totals;
  out.Counter("kvshare_prompt_tokens_total", "Prompt tokens of generations that ended well.", totals.prompt_tokens);
  out.Counter("kvshare_generation_tokens_total", "Generated tokens.", totals.generated_tokens);
  out.Family("kvshare_reused_tokens_total", "counter", "Prompt tokens whose KV was reused, by how.");
  out.Sample(totals.prefix_tokens, {{"method", "prefix"}});
  out.Sample(totals.moved_tokens, {{"method", "moved"}});
  out.Counter("kvshare_recomputed_tokens_total", "Prompt tokens computed although a chunk was found.",
              totals.recomputed_tokens);
  out.Counter("kvshare_fresh_tokens_total", "Prompt tokens computed because nothing was found.", totals.fresh_tokens);
  std::map<std::string_view, std::int64_t> missed;
  for (const std::string_view reason : kMissReasons) missed[reason] = 0;
  for (const auto& [reason, tokens] : stats.miss_reasons) missed[reason] = tokens;
  out.Family("kvshare_miss_total", "counter", "Prompt tokens computed, by why they were not reused.");
  for (const auto& [reason, tokens] : missed) out.Sample(tokens, {{"reason", reason}});
}

void Tiers(Writer& out, const Stats& stats) {
  const Labels host = {{"tier", "host"}};
  const Labels cold = {{"tier", "cold"}};
  out.Family("kvshare_pool_bytes", "gauge",
             "KV that is stored; on disk: everything under the directory, as allocated.");
  out.Sample(stats.pool.used_bytes, host);
  out.Sample(stats.cold.bytes, cold);
  out.Family("kvshare_pool_capacity_bytes", "gauge", "What may be stored.");
  out.Sample(stats.pool.capacity_bytes, host);
  out.Sample(stats.cold.capacity_bytes, cold);
  out.Family("kvshare_entries", "gauge", "Pages that are stored.");
  out.Sample(stats.pool.pages, host);
  out.Sample(stats.cold.entries, cold);
  out.Family("kvshare_evictions_total", "counter", "Pages that went for want of room.");
  out.Sample(stats.pool.evictions, host);
  out.Sample(stats.cold.evictions, cold);
  out.Gauge("kvshare_pool_pages_in_use", "Pages that running requests and leases hold.",
            static_cast<double>(stats.pool.leases));
  out.Gauge("kvshare_pinned_bytes", "KV that pins keep.", static_cast<double>(stats.pinned_bytes));
  const ApproximateStats& approximate = stats.approximate;
  const AuditTotals first = Sum(approximate.audits);
  const AuditTotals later = Sum(approximate.later_audits);
  out.Counter("kvshare_approximate_answers_total", "Answers given over KV from other places.", approximate.answers);
  out.Counter("kvshare_guard_sent_back_total", "Prompts computed after all, because the guard doubted.",
              approximate.sent_back);
  out.Counter("kvshare_healed_total", "Approximate answers computed exactly afterwards.", approximate.healed);
  const Labels by_first = {{"token", "first"}}, by_later = {{"token", "later"}};
  out.Family("kvshare_audits_total", "counter",
             "Of these, compared with exact by their first token, or by a later one.");
  out.Sample(first.audits, by_first);
  out.Sample(later.audits, by_later);
  out.Family("kvshare_audit_failures_total", "counter", "Of these, more than 0.05 nats away.");
  out.Sample(first.failures, by_first);
  out.Sample(later.failures, by_later);
  out.Family("kvshare_audit_kl_nats_total", "counter", "KL(exact || approximate), summed over audits.");
  out.Sample(first.kl_sum, by_first);
  out.Sample(later.kl_sum, by_later);
  out.Counter("kvshare_shadow_audits_total", "Exact answers compared with what chunks that are not trusted would give.",
              approximate.shadow_audits.audits);
  out.Counter("kvshare_shadow_audit_failures_total", "Of these, more than 0.05 nats away.",
              approximate.shadow_audits.failures);
  out.Family("kvshare_guard_margin_nats", "gauge",
             "By which the likeliest token must be ahead in mode auto; 1e6: nothing is trusted.");
  out.Sample(approximate.guard_margin, {{"chunks", "thread"}});
  out.Sample(approximate.guard_margin_elsewhere, {{"chunks", "elsewhere"}});
  out.Gauge("kvshare_moved_row_cost", "Rows of plain prefill that take as long as one over moved chunks in mode auto.",
            approximate.moved_row);
  out.Gauge("kvshare_kept_bytes", "KV of approximate requests that their sessions may use again.",
            static_cast<double>(approximate.kept_bytes));
  out.Gauge("kvshare_leases", "Leases that clients hold.", static_cast<double>(stats.client_leases));
  out.Counter("kvshare_cold_hits_total", "Pages loaded from disk.", stats.cold.hits);
  out.Counter("kvshare_cold_misses_total", "Pages asked of the disk in vain.", stats.cold.misses);
  out.Counter("kvshare_cold_stores_total", "Pages written to disk.", stats.cold.stores);
  out.Counter("kvshare_cold_dropped_total", "Pages that could not be written in time.", stats.cold.dropped);
  out.Counter("kvshare_cold_read_bytes_total", "KV read from disk.", stats.cold.read_bytes);
  out.Counter("kvshare_cold_write_bytes_total", "KV written to disk.", stats.cold.written_bytes);
  out.Gauge("kvshare_cold_degraded", "1 while the cold tier only reads, or is off against the settings.",
            stats.cold.state.empty() || stats.cold.state == "ok" ? 0 : 1);
  out.Counter("kvshare_integrity_errors_total", "Stored records that were damaged, and dropped.",
              stats.cold.integrity_errors);
}

void Anchors(Writer& out, const AnchorStats& anchors) {
  out.Family("kvshare_anchor_bytes", "gauge", "What mode kvcomm has learnt.");
  out.Sample(anchors.bytes, {{"tier", "host"}});
  out.Sample(anchors.disk_bytes, {{"tier", "cold"}});
  out.Counter("kvshare_anchors_saved_total", "Anchors written to disk.", anchors.saved);
  out.Counter("kvshare_anchors_loaded_total", "Anchors read back for their session.", anchors.loaded);
  out.Counter("kvshare_anchors_dropped_total", "Anchors that could not be written.", anchors.dropped);
  std::map<std::string_view, std::int64_t> misses;
  for (const std::string_view reason : kAnchorMisses) misses[reason] = 0;
  for (const auto& [reason, times] : anchors.misses) misses[reason] = times;
  out.Family("kvshare_anchor_misses_total", "counter", "Saved anchors, or lists of them, that were not used, by why.");
  for (const auto& [reason, times] : misses) out.Sample(times, {{"reason", reason}});
}

void Sockets(Writer& out, const MetricsInput& in) {
  out.Counter("kvshare_zmq_messages_total", "Frames received on the native socket.", in.wire.frames);
  out.Counter("kvshare_zmq_malformed_total", "Of these, refused before anything was asked.", in.wire.malformed_frames);
  out.Counter("kvshare_zmq_replies_dropped_total", "Replies whose client was gone, or did not read.",
              in.wire.replies_dropped);
  out.Counter("kvshare_zmq_clients_lost_total", "Clients that went while requests of theirs ran.",
              in.wire.clients_lost);
  out.Counter("kvshare_http_connections_total", "HTTP connections accepted.", in.http.connections);
  out.Counter("kvshare_http_requests_total", "HTTP requests answered.", in.http.requests);
  out.Counter("kvshare_http_refused_total", "HTTP requests or connections refused: malformed, too large, too slow.",
              in.http.refused);
}

}  // namespace

std::span<const std::string_view> KnownMissReasons() { return kMissReasons; }

std::string MetricsText(const MetricsInput& input) {
  Writer out;
  Daemon(out, input);
  Requests(out, input.stats);
  Tokens(out, input.stats);
  Tiers(out, input.stats);
  Anchors(out, input.stats.anchors);
  Sockets(out, input);
  return out.Take();
}

}  // namespace kvshare::agentd
