// Requests one by one: the dump that checks read, and the table that a spreadsheet reads.
#include <nlohmann/json.hpp>

#include "libkvshare/core/json_text.h"
#include "tools/trace/csv.h"
#include "tools/trace/report.h"

namespace kvshare::trace {
namespace {

using Json = nlohmann::ordered_json;

double Round(double value) { return static_cast<double>(static_cast<std::int64_t>(value * 1000 + 0.5)) / 1000; }

}  // namespace

void WriteDump(const Replay& replay, std::ostream& out) {
  for (const ModeResult& mode : replay.modes) {
    for (std::size_t r = 0; r < mode.requests.size(); ++r) {
      const TraceRequest& recorded = replay.trace.requests[replay.prompts[r].request];
      const RequestResult& result = mode.requests[r];
      Json misses = Json::array();
      for (const MissReason& miss : result.reuse.miss_reasons) {
        misses.push_back({{"reason", miss.reason}, {"tokens", miss.tokens}});
      }
      const Json json = {{"request_id", recorded.id},
                         {"mode", ReuseModeName(mode.mode)},
                         {"agent", recorded.agent},
                         {"ids", replay.prompts[r].ids},
                         {"output_ids", result.output_ids},
                         {"prefix_tokens", result.reuse.prefix_tokens},
                         {"moved_tokens", result.reuse.moved_tokens},
                         {"recomputed_tokens", result.reuse.recomputed_tokens},
                         {"fresh_tokens", result.reuse.fresh_tokens},
                         {"ttft_ms", Round(result.ttft_ms)},
                         {"start_ms", Round(result.start_ms)},
                         {"end_ms", Round(result.end_ms)},
                         {"miss_reasons", std::move(misses)}};
      out << JsonText(json) << '\n';
    }
  }
}

void WriteRequestsCsv(const Replay& replay, std::ostream& out) {
  out << "mode,request_id,session,agent,truncated,prompt_tokens,prefix_tokens,moved_tokens,recomputed_tokens,"
         "fresh_tokens,output_tokens,start_ms,ttft_ms,end_ms\n";
  for (const ModeResult& mode : replay.modes) {
    for (std::size_t r = 0; r < mode.requests.size(); ++r) {
      const TraceRequest& recorded = replay.trace.requests[replay.prompts[r].request];
      const RequestResult& result = mode.requests[r];
      out << ReuseModeName(mode.mode) << ',' << CsvField(recorded.id) << ',' << CsvField(recorded.session) << ','
          << CsvField(recorded.agent) << ',' << (replay.prompts[r].truncated ? 1 : 0) << ','
          << replay.prompts[r].ids.size() << ',' << result.reuse.prefix_tokens << ',' << result.reuse.moved_tokens
          << ',' << result.reuse.recomputed_tokens << ',' << result.reuse.fresh_tokens << ','
          << result.output_ids.size() << ',' << CsvNumber(result.start_ms) << ',' << CsvNumber(result.ttft_ms) << ','
          << CsvNumber(result.end_ms) << '\n';
    }
  }
}

}  // namespace kvshare::trace
