// The C interface: generation.
#include <optional>

#include "libkvshare/capi/capi.h"
#include "libkvshare/core/status_macros.h"

struct kvs_stream {
  std::shared_ptr<kvshare::Client> client;  // outlives the stream
  std::unique_ptr<kvshare::TokenStream> stream;
  kvshare::TokenChunk chunk;  // what the last kvs_stream_next pointed to
  bool ended = false;
};

namespace kvshare::capi {
namespace {

constexpr std::size_t kStopsMax = 1024;  // the wire takes fewer, and says so

Status Generate(kvs_client* client, const kvs_generate_request* request, kvs_stream** stream) {
  KVS_RETURN_IF_ERROR(CheckClient(client));
  if (stream == nullptr) return InvalidArgument("stream is NULL");
  kvs_generate_request in{};
  KVS_RETURN_IF_ERROR(ReadStruct(request, "request", &in));
  KVS_ASSIGN_OR_RETURN(PromptParts parts, ReadPrompt(in.prompt));
  GenerateRequest out{.prompt = std::move(parts.prompt),
                      .sampling = {.temperature = in.temperature,
                                   .top_k = in.top_k,
                                   .top_p = in.top_p == 0.0f ? 1.0f : in.top_p,
                                   .seed = in.seed},
                      .max_tokens = in.max_tokens,
                      .ignore_eos = in.ignore_eos != 0,
                      .agent = std::move(parts.agent),
                      .session = std::move(parts.session)};
  if (in.num_stop > kStopsMax || (in.num_stop > 0 && in.stop == nullptr)) {
    return InvalidArgument("request.stop is not " + std::to_string(in.num_stop) + " strings");
  }
  for (std::size_t i = 0; i < in.num_stop; ++i) {
    if (in.stop[i] == nullptr) return InvalidArgument("a stop string is NULL");
    out.stop.emplace_back(in.stop[i]);
  }
  KVS_ASSIGN_OR_RETURN(out.reuse, ReadReuse(in.reuse));
  if (in.timeout_ms < 0) return InvalidArgument("request.timeout_ms is negative");
  if (in.timeout_ms > 0) out.timeout = std::chrono::milliseconds(in.timeout_ms);
  KVS_ASSIGN_OR_RETURN(std::unique_ptr<TokenStream> started, client->client->Generate(out));
  *stream = new kvs_stream{.client = client->client, .stream = std::move(started)};
  return OkStatus();
}

Status Next(kvs_stream* stream, kvs_chunk* chunk, bool* ended) {
  if (stream == nullptr) return InvalidArgument("stream is NULL");
  KVS_ASSIGN_OR_RETURN(std::optional<TokenChunk> next, stream->stream->Next());
  stream->ended = *ended = !next.has_value();
  if (*ended) return OkStatus();
  stream->chunk = *std::move(next);
  kvs_chunk out{};
  out.ids = stream->chunk.ids.data();
  out.num_ids = stream->chunk.ids.size();
  out.text = stream->chunk.text.c_str();
  out.text_len = stream->chunk.text.size();
  return WriteStruct(out, "chunk", chunk);
}

Status Reply(const kvs_stream* stream, kvs_reply* reply) {
  if (stream == nullptr) return InvalidArgument("stream is NULL");
  if (!stream->ended) return FailedPrecondition("the stream has not ended with KVS_END");
  const GenerateReply& from = stream->stream->reply();
  kvs_reply out{};
  out.ids = from.ids.data();
  out.num_ids = from.ids.size();
  out.text = from.text.c_str();
  out.text_len = from.text.size();
  out.request_id = from.request_id;
  out.finished_by_length = from.finish_reason == FinishReason::kLength ? 1 : 0;
  out.approximate = from.reuse.approximate ? 1 : 0;
  out.prompt_tokens = from.prompt_tokens;
  out.prefix_tokens = from.reuse.prefix_tokens;
  out.moved_tokens = from.reuse.moved_tokens;
  out.recomputed_tokens = from.reuse.recomputed_tokens;
  out.fresh_tokens = from.reuse.fresh_tokens;
  out.queue_ms = from.timings.queue_ms;
  out.ttft_ms = from.timings.ttft_ms;
  out.prompt_ms = from.timings.prompt_ms;
  out.predicted_ms = from.timings.predicted_ms;
  return WriteStruct(out, "reply", reply);
}

}  // namespace
}  // namespace kvshare::capi

extern "C" {

kvs_status kvs_generate(kvs_client* client, const kvs_generate_request* request, kvs_stream** stream) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::Generate(client, request, stream); });
}

kvs_status kvs_stream_next(kvs_stream* stream, kvs_chunk* chunk) {
  bool ended = false;
  const kvs_status status = kvshare::capi::Guarded([&] { return kvshare::capi::Next(stream, chunk, &ended); });
  return status == KVS_OK && ended ? KVS_END : status;
}

void kvs_stream_cancel(kvs_stream* stream) {
  kvshare::capi::Guarded([&] {
    if (stream != nullptr) stream->stream->Cancel();
    return kvshare::OkStatus();
  });
}

kvs_status kvs_stream_reply(const kvs_stream* stream, kvs_reply* reply) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::Reply(stream, reply); });
}

void kvs_stream_free(kvs_stream* stream) {
  kvshare::capi::Guarded([&] {
    delete stream;
    return kvshare::OkStatus();
  });
}

}  // extern "C"
