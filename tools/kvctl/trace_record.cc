// kvctl trace record: passes requests on to a daemon, replies back, and writes both down as KTR-1.
//
// Each line of the input is one request, sent when it has been read and answered before the next one is. The replies go
// to stdout, a line each, so that a program can stand at both ends.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/exit_code.h"
#include "tools/kvctl/target.h"
#include "tools/trace/builder.h"
#include "tools/trace/chat_rows.h"
#include "tools/trace/json_line.h"
#include "tools/trace/ktr_writer.h"
#include "tools/trace/line_file.h"

namespace kvshare::kvctl {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

Prompt PromptOf(const trace::ChatRow& row) {
  if (!row.ids.empty()) return TokenPrompt{row.ids};
  if (!row.messages_json.empty()) return ChatPrompt{.messages_json = row.messages_json, .tools_json = row.tools_json};
  return TextPrompt{row.messages.front().text};
}

class Recorder {
 public:
  Recorder(const TraceRecordOptions& options, Target* target, trace::LineFile* file)
      : options_(options),
        target_(target),
        file_(file),
        writer_(&builder_.trace(), [file](std::string_view line) { return file->Write(line); }) {
    builder_.trace().header.name = options.out_file.substr(options.out_file.find_last_of('/') + 1);
    builder_.trace().header.time_base = trace::TimeBase::kArrival;
    builder_.trace().header.origin = "kvctl trace record, kvshare " KVS_VERSION;
  }

  Status Header() {
    KVS_RETURN_IF_ERROR(writer_.Header());
    return file_->Flush();
  }

  Status Record(std::string_view line) {
    const double arrived_ms = Now();
    KVS_ASSIGN_OR_RETURN(const nlohmann::json json, trace::ParseJsonLine(line));
    if (!json.is_object()) return InvalidArgument("not a JSON object");
    KVS_ASSIGN_OR_RETURN(trace::ChatRow row, trace::ParseChatRow(json));
    row.output.reset();  // a recorded reply is not this daemon's
    row.timestamp_ms = std::round(arrived_ms);
    row.model = target_->info().model;
    KVS_ASSIGN_OR_RETURN(const GenerateReply reply, Send(row));
    const double done_ms = Now();
    KVS_ASSIGN_OR_RETURN(const std::size_t index, trace::AddChatRow(row, &builder_));
    KVS_RETURN_IF_ERROR(trace::AddChatOutput(index, reply.text, &builder_));
    trace::TraceRequest& request = builder_.trace().requests[index];
    request.api_ms = std::round(done_ms - arrived_ms);
    request.input_length = reply.prompt_tokens;
    request.output_length = static_cast<std::int64_t>(reply.ids.size());
    done_ms_.push_back(done_ms);
    double after = 0;
    for (const std::size_t w : request.wait_for) after = std::max(after, done_ms_[w]);
    if (!request.wait_for.empty()) request.delay_ms = std::max(0.0, std::round(arrived_ms - after));
    KVS_RETURN_IF_ERROR(writer_.Request(index));
    KVS_RETURN_IF_ERROR(file_->Flush());
    Print(request.id, reply);
    return OkStatus();
  }

  std::size_t requests() const { return done_ms_.size(); }

 private:
  double Now() const { return std::chrono::duration<double, std::milli>(Clock::now() - start_).count(); }

  Result<GenerateReply> Send(const trace::ChatRow& row) {
    GenerateRequest request{.prompt = PromptOf(row)};
    request.max_tokens = row.max_tokens > 0 ? static_cast<int>(row.max_tokens) : options_.max_tokens;
    request.sampling.temperature = static_cast<float>(row.temperature);
    request.sampling.top_p = static_cast<float>(row.top_p);
    request.sampling.seed = row.seed;
    request.agent = row.agent;
    request.session = row.session;
    request.reuse = options_.reuse;
    request.timeout = options_.source.timeout;
    return target_->client().GenerateAll(request);
  }

  static void Print(const std::string& id, const GenerateReply& reply) {
    const Json json = {{"request_id", id},
                       {"text", reply.text},
                       {"finish_reason", FinishReasonName(reply.finish_reason)},
                       {"prompt_tokens", reply.prompt_tokens},
                       {"completion_tokens", reply.ids.size()},
                       {"prefix_tokens", reply.reuse.prefix_tokens},
                       {"moved_tokens", reply.reuse.moved_tokens},
                       {"ttft_ms", reply.timings.ttft_ms}};
    std::puts(JsonText(json).c_str());
    std::fflush(stdout);
  }

  const TraceRecordOptions& options_;
  Target* const target_;
  trace::LineFile* const file_;
  trace::TraceBuilder builder_;
  trace::KtrWriter writer_;
  const Clock::time_point start_ = Clock::now();
  std::vector<double> done_ms_;  // by request
};

}  // namespace

int RunTraceRecord(const TraceRecordOptions& options) {
  const std::string input = options.in_file == "-" ? "stdin" : options.in_file;
  std::ifstream named;
  if (options.in_file != "-") {
    named.open(options.in_file, std::ios::binary);
    if (!named) return Fail(kNotFound, input + ": cannot be opened");
  }
  std::istream& in = options.in_file == "-" ? std::cin : named;
  Failure failure;
  const Source& source = options.source;
  const auto target = Target::Open({.model = source.model,
                                    .endpoint = source.endpoint,
                                    .timeout = source.timeout,
                                    .dtype = source.dtype,
                                    .threads = source.threads,
                                    .reuse = options.reuse.value_or(ReuseMode::kExact),
                                    .lora = source.lora},
                                   &failure);
  if (!target) return Fail(failure);
  const auto file = trace::LineFile::Create(options.out_file);
  if (!file.ok()) return Fail(file.status());
  Recorder recorder(options, target.get(), file->get());
  Status status = recorder.Header();
  std::int64_t number = 0;
  for (std::string line; status.ok() && !Interrupted() && std::getline(in, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    status = recorder.Record(line);
    if (!status.ok()) status = status.WithContext(input + ": line " + std::to_string(number));
  }
  // What was recorded before a failure is kept.
  const Status closed = (*file)->Close();
  if (status.ok()) status = closed;
  if (!status.ok()) return Fail(status);
  if (Interrupted()) return Fail(kInterrupted, "interrupted");
  std::fprintf(stderr, "%s: %zu requests recorded\n", options.out_file.c_str(), recorder.requests());
  return kOk;
}

}  // namespace kvshare::kvctl
