#include "libkvshare/codec/stats_codec.h"

#include <optional>
#include <utility>

namespace kvshare::codec::internal {
namespace {

using flatbuffers::FlatBufferBuilder;
using flatbuffers::Offset;
using flatbuffers::Vector;

Offset<wire::Totals> WriteTotals(FlatBufferBuilder& builder, const ReuseTotals& totals) {
  return wire::CreateTotals(builder, totals.requests, totals.prompt_tokens, totals.prefix_tokens, totals.moved_tokens,
                            totals.recomputed_tokens, totals.fresh_tokens, totals.generated_tokens);
}

ReuseTotals ReadTotals(const wire::Totals* in) {
  if (in == nullptr) return {};
  return {.requests = in->requests(),
          .prompt_tokens = in->prompt_tokens(),
          .prefix_tokens = in->prefix_tokens(),
          .moved_tokens = in->moved_tokens(),
          .recomputed_tokens = in->recomputed_tokens(),
          .fresh_tokens = in->fresh_tokens(),
          .generated_tokens = in->generated_tokens()};
}

Status CheckHistogram(const Histogram& histogram) {
  KVS_RETURN_IF_ERROR(CheckSize("number of a histogram's bounds", histogram.bounds.size(), wire::kMaxBounds));
  const bool empty = histogram.bounds.empty() && histogram.counts.empty();
  if (!empty && histogram.counts.size() != histogram.bounds.size() + 1) {
    return InvalidArgument("a histogram of " + std::to_string(histogram.bounds.size()) + " bounds has " +
                           std::to_string(histogram.counts.size()) + " counts");
  }
  for (double bound : histogram.bounds) KVS_RETURN_IF_ERROR(CheckFinite("a histogram's bound", bound));
  return CheckFinite("a histogram's sum", histogram.sum);
}

Result<Offset<wire::Histogram>> WriteHistogram(FlatBufferBuilder& builder, const Histogram& histogram) {
  KVS_RETURN_IF_ERROR(CheckHistogram(histogram));
  const auto bounds = builder.CreateVector(histogram.bounds);
  const auto counts = builder.CreateVector(histogram.counts);
  return wire::CreateHistogram(builder, bounds, counts, histogram.sum);
}

Status ReadHistogram(const wire::Histogram* in, Histogram* out) {
  if (in == nullptr) return OkStatus();
  if (in->bounds() != nullptr) {
    KVS_RETURN_IF_ERROR(CheckSize("number of a histogram's bounds", in->bounds()->size(), wire::kMaxBounds));
    KVS_RETURN_IF_ERROR(CheckAligned("a histogram's bounds", in->bounds()));
    out->bounds.assign(in->bounds()->begin(), in->bounds()->end());
  }
  if (in->counts() != nullptr) {
    KVS_RETURN_IF_ERROR(CheckSize("number of a histogram's counts", in->counts()->size(), wire::kMaxBounds + 1));
    KVS_RETURN_IF_ERROR(CheckAligned("a histogram's counts", in->counts()));
    out->counts.assign(in->counts()->begin(), in->counts()->end());
  }
  out->sum = in->sum();
  return CheckHistogram(*out);
}

using AuditList = Vector<Offset<wire::AuditTotals>>;

Result<Offset<wire::AuditTotals>> WriteAudit(FlatBufferBuilder& builder, const AuditTotals& audit) {
  KVS_RETURN_IF_ERROR(CheckFinite("the audits' KL", audit.kl_sum));
  return wire::CreateAuditTotals(builder, audit.audits, audit.failures, audit.kl_sum);
}

Status ReadAudit(const wire::AuditTotals* in, AuditTotals* out) {
  if (in == nullptr) return OkStatus();
  *out = {.audits = in->audits(), .failures = in->failures(), .kl_sum = in->kl_sum()};
  return CheckFinite("the audits' KL", in->kl_sum());
}

Result<Offset<AuditList>> WriteAudits(FlatBufferBuilder& builder, std::span<const AuditTotals> audits) {
  KVS_RETURN_IF_ERROR(CheckSize("number of depths", audits.size(), wire::kMaxAuditDepths));
  std::vector<Offset<wire::AuditTotals>> out;
  for (const AuditTotals& audit : audits) {
    KVS_ASSIGN_OR_RETURN(out.emplace_back(), WriteAudit(builder, audit));
  }
  return builder.CreateVector(out);
}

Status ReadAudits(const AuditList* in, std::vector<AuditTotals>* out) {
  if (in == nullptr) return OkStatus();
  KVS_RETURN_IF_ERROR(CheckSize("number of depths", in->size(), wire::kMaxAuditDepths));
  for (const wire::AuditTotals* audit : *in) {
    KVS_RETURN_IF_ERROR(ReadAudit(audit, &out->emplace_back()));
  }
  return OkStatus();
}

Result<Offset<wire::Approximate>> WriteApproximate(FlatBufferBuilder& builder, const ApproximateStats& a) {
  KVS_RETURN_IF_ERROR(CheckFinite("the guard's margin", a.guard_margin));
  KVS_RETURN_IF_ERROR(CheckFinite("the guard's margin", a.guard_margin_elsewhere));
  KVS_RETURN_IF_ERROR(CheckFinite("the price of a row", a.moved_row));
  KVS_ASSIGN_OR_RETURN(const auto audits, WriteAudits(builder, a.audits));
  KVS_ASSIGN_OR_RETURN(const auto later, WriteAudits(builder, a.later_audits));
  KVS_ASSIGN_OR_RETURN(const auto shadow, WriteAudit(builder, a.shadow_audits));
  return wire::CreateApproximate(builder, a.answers, a.sent_back, a.healed, a.kept_bytes, a.guard_margin, audits, later,
                                 a.guard_margin_elsewhere, shadow, a.moved_row);
}

Status ReadApproximate(const wire::Approximate* in, ApproximateStats* out) {
  if (in == nullptr) return OkStatus();  // an older daemon
  *out = {.answers = in->answers(),
          .sent_back = in->sent_back(),
          .healed = in->healed(),
          .kept_bytes = in->kept_bytes(),
          .guard_margin = in->guard_margin(),
          .guard_margin_elsewhere = in->guard_margin_elsewhere(),
          .moved_row = in->moved_row()};
  KVS_RETURN_IF_ERROR(CheckFinite("the guard's margin", out->guard_margin));
  KVS_RETURN_IF_ERROR(CheckFinite("the guard's margin", out->guard_margin_elsewhere));
  KVS_RETURN_IF_ERROR(CheckFinite("the price of a row", out->moved_row));
  KVS_RETURN_IF_ERROR(ReadAudits(in->audits(), &out->audits));
  KVS_RETURN_IF_ERROR(ReadAudit(in->shadow_audits(), &out->shadow_audits));
  return ReadAudits(in->later_audits(), &out->later_audits);
}

Result<Offset<wire::Anchors>> WriteAnchors(FlatBufferBuilder& builder, const AnchorStats& a) {
  std::vector<MissReason> reasons;
  for (const auto& [reason, times] : a.misses) reasons.push_back({reason, times});
  KVS_ASSIGN_OR_RETURN(const auto misses, WriteMissReasons(builder, reasons));
  return wire::CreateAnchors(builder, a.bytes, a.disk_bytes, a.disk_capacity_bytes, a.saved, a.loaded, a.dropped,
                             misses);
}

Status ReadAnchors(const wire::Anchors* in, AnchorStats* out) {
  if (in == nullptr) return OkStatus();  // an older daemon
  out->bytes = in->bytes();
  out->disk_bytes = in->disk_bytes();
  out->disk_capacity_bytes = in->disk_capacity_bytes();
  out->saved = in->saved();
  out->loaded = in->loaded();
  out->dropped = in->dropped();
  std::vector<MissReason> reasons;
  KVS_RETURN_IF_ERROR(ReadMissReasons(in->misses(), &reasons));
  for (MissReason& reason : reasons) {
    if (!out->misses.emplace(std::move(reason.reason), reason.tokens).second) {
      return InvalidArgument("a reason for unused anchors stands twice in the statistics");
    }
  }
  return OkStatus();
}

}  // namespace

Result<Offset<wire::Stats>> WriteStats(FlatBufferBuilder& builder, const Stats& stats) {
  KVS_RETURN_IF_ERROR(CheckSize("number of agents", stats.agents.size(), wire::kMaxAgents));
  std::vector<MissReason> reasons;
  for (const auto& [reason, tokens] : stats.miss_reasons) reasons.push_back({reason, tokens});
  KVS_ASSIGN_OR_RETURN(const auto miss_reasons, WriteMissReasons(builder, reasons));
  std::vector<Offset<wire::AgentTotals>> offsets;
  offsets.reserve(stats.agents.size());
  for (const auto& [agent, totals] : stats.agents) {
    KVS_RETURN_IF_ERROR(CheckName("an agent name", agent));
    const auto name = WriteString(builder, agent);
    const auto agent_totals = WriteTotals(builder, totals);
    offsets.push_back(wire::CreateAgentTotals(builder, name, agent_totals));
  }
  const auto agents = builder.CreateVector(offsets);
  const auto totals = WriteTotals(builder, stats.totals);
  const PoolStats& p = stats.pool;
  const auto pool = wire::CreatePool(builder, p.capacity_bytes, p.used_bytes, p.pages, p.leases, p.evictions);
  const ColdStats& c = stats.cold;
  const auto state = WriteString(builder, FirstOf(c.state, wire::kMaxNameBytes));  // it may hold a path
  const auto cold =
      wire::CreateCold(builder, c.entries, c.bytes, c.hits, c.misses, c.integrity_errors, c.capacity_bytes, c.stores,
                       c.dropped, c.evictions, c.read_bytes, c.written_bytes, state);
  KVS_ASSIGN_OR_RETURN(const auto ttft, WriteHistogram(builder, stats.ttft_seconds));
  KVS_ASSIGN_OR_RETURN(const auto queue, WriteHistogram(builder, stats.queue_seconds));
  KVS_ASSIGN_OR_RETURN(const auto prefill, WriteHistogram(builder, stats.prefill_seconds));
  KVS_ASSIGN_OR_RETURN(const auto inter_token, WriteHistogram(builder, stats.inter_token_seconds));
  KVS_RETURN_IF_ERROR(CheckFinite("uptime", stats.uptime_s));
  KVS_ASSIGN_OR_RETURN(const auto approximate, WriteApproximate(builder, stats.approximate));
  KVS_ASSIGN_OR_RETURN(const auto anchors, WriteAnchors(builder, stats.anchors));
  return wire::CreateStats(builder, totals, pool, cold, stats.requests_running, stats.requests_waiting,
                           stats.requests_failed, miss_reasons, agents, stats.pinned_bytes, stats.client_leases,
                           stats.uptime_s, ttft, queue, prefill, inter_token, approximate, anchors);
}

Result<Stats> ReadStats(const wire::Stats& in) {
  Stats stats;
  stats.totals = ReadTotals(in.totals());
  if (const wire::Pool* pool = in.pool()) {
    stats.pool = {.capacity_bytes = pool->capacity_bytes(),
                  .used_bytes = pool->used_bytes(),
                  .pages = pool->pages(),
                  .leases = pool->leases(),
                  .evictions = pool->evictions()};
  }
  if (const wire::Cold* cold = in.cold()) {
    stats.cold = {.entries = cold->entries(),
                  .bytes = cold->bytes(),
                  .hits = cold->hits(),
                  .misses = cold->misses(),
                  .integrity_errors = cold->integrity_errors(),
                  .capacity_bytes = cold->capacity_bytes(),
                  .stores = cold->stores(),
                  .dropped = cold->dropped(),
                  .evictions = cold->evictions(),
                  .read_bytes = cold->read_bytes(),
                  .written_bytes = cold->written_bytes()};
    KVS_RETURN_IF_ERROR(ReadName("cold tier's state", cold->state(), &stats.cold.state));
  }
  KVS_RETURN_IF_ERROR(ReadApproximate(in.approximate(), &stats.approximate));
  KVS_RETURN_IF_ERROR(ReadAnchors(in.anchors(), &stats.anchors));
  stats.requests_running = in.requests_running();
  stats.requests_waiting = in.requests_waiting();
  stats.requests_failed = in.requests_failed();
  std::vector<MissReason> reasons;
  KVS_RETURN_IF_ERROR(ReadMissReasons(in.miss_reasons(), &reasons));
  for (MissReason& reason : reasons) {
    if (!stats.miss_reasons.emplace(std::move(reason.reason), reason.tokens).second) {
      return InvalidArgument("a miss reason stands twice in the statistics");
    }
  }
  if (in.agents() != nullptr) {
    KVS_RETURN_IF_ERROR(CheckSize("number of agents", in.agents()->size(), wire::kMaxAgents));
    for (const wire::AgentTotals* agent : *in.agents()) {
      std::string name;
      KVS_RETURN_IF_ERROR(ReadName("agent name", agent->agent(), &name));
      if (!stats.agents.emplace(std::move(name), ReadTotals(agent->totals())).second) {
        return InvalidArgument("an agent stands twice in the statistics");
      }
    }
  }
  stats.pinned_bytes = in.pinned_bytes();
  stats.client_leases = in.client_leases();
  stats.uptime_s = in.uptime_s();
  KVS_RETURN_IF_ERROR(CheckFinite("uptime", stats.uptime_s));
  KVS_RETURN_IF_ERROR(ReadHistogram(in.ttft_seconds(), &stats.ttft_seconds));
  KVS_RETURN_IF_ERROR(ReadHistogram(in.queue_seconds(), &stats.queue_seconds));
  KVS_RETURN_IF_ERROR(ReadHistogram(in.prefill_seconds(), &stats.prefill_seconds));
  KVS_RETURN_IF_ERROR(ReadHistogram(in.inter_token_seconds(), &stats.inter_token_seconds));
  return stats;
}

}  // namespace kvshare::codec::internal
