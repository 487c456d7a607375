// kvctl trace convert: a trace in another format.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <optional>

#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/exit_code.h"
#include "tools/kvctl/target.h"
#include "tools/trace/ktr_writer.h"
#include "tools/trace/line_file.h"
#include "tools/trace/mooncake_writer.h"
#include "tools/trace/prompts.h"
#include "tools/trace/trace_reader.h"

namespace kvshare::kvctl {
namespace {

Status WriteKtr(const trace::Trace& trace, const std::string& path) {
  KVS_ASSIGN_OR_RETURN(const auto file, trace::LineFile::Create(path));
  trace::KtrWriter writer(&trace, [&](std::string_view line) { return file->Write(line); });
  KVS_RETURN_IF_ERROR(writer.Header());
  for (std::size_t r = 0; r < trace.requests.size(); ++r) KVS_RETURN_IF_ERROR(writer.Request(r));
  return file->Close();
}

// `client` is null where every request has block ids or a length alone.
Status WriteMooncake(const trace::Trace& trace, Client* client, std::int64_t block_tokens, const std::string& path) {
  KVS_ASSIGN_OR_RETURN(const auto file, trace::LineFile::Create(path));
  trace::MooncakeWriter writer(&trace, block_tokens);
  std::optional<trace::PromptBuilder> builder;
  if (client != nullptr) {
    // No window: the trace is to be as long as it was.
    builder.emplace(client, &trace, trace::PromptOptions{.window = std::numeric_limits<std::int32_t>::max()});
    KVS_RETURN_IF_ERROR(builder->ProbeRoles());
  }
  for (std::size_t r = 0; r < trace.requests.size(); ++r) {
    if (Interrupted()) return Cancelled("interrupted");
    std::string row;
    if (trace.HasText(r)) {
      KVS_ASSIGN_OR_RETURN(const trace::PreparedPrompt prompt, builder->Build(r));
      row = writer.Row(r, prompt.ids, prompt.max_tokens);
    } else {
      row = writer.Row(r, std::nullopt, trace.requests[r].output_length);
    }
    KVS_RETURN_IF_ERROR(file->Write(row));
  }
  return file->Close();
}

}  // namespace

int RunTraceConvert(const TraceConvertOptions& options) {
  const auto trace = trace::ReadTrace(options.in_file);
  if (!trace.ok()) return Fail(trace.status());
  Status status;
  if (!options.to_mooncake) {
    status = WriteKtr(*trace, options.out_file);
  } else {
    bool text = false;
    for (std::size_t r = 0; r < trace->requests.size(); ++r) text = text || trace->HasText(r);
    const Source& source = options.source;
    std::unique_ptr<Target> target;
    if (text) {
      if (source.model.empty() == source.endpoint.empty()) {
        return Fail(kUsage,
                    "a trace of texts needs exactly one of --model and --endpoint, whose tokenizer cuts blocks");
      }
      Failure failure;
      target = Target::Open({.model = source.model,
                             .endpoint = source.endpoint,
                             .timeout = source.timeout,
                             .dtype = source.dtype,
                             .threads = source.threads,
                             .lora = source.lora},
                            &failure);
      if (!target) return Fail(failure);
    }
    status = WriteMooncake(*trace, target ? &target->client() : nullptr, options.block_tokens, options.out_file);
  }
  if (!status.ok()) return Fail(status);
  std::fprintf(stderr, "%s: %zu requests\n", options.out_file.c_str(), trace->requests.size());
  return kOk;
}

}  // namespace kvshare::kvctl
