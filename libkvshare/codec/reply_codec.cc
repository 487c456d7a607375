// Replies: structs <-> frames.
#include <string>
#include <utility>

#include "libkvshare/codec/codec.h"
#include "libkvshare/codec/fields.h"
#include "libkvshare/codec/stats_codec.h"
#include "libkvshare/codec/stored_codec.h"
#include "libkvshare/core/check.h"

namespace kvshare::codec {
namespace {

using flatbuffers::FlatBufferBuilder;
using flatbuffers::Offset;
using flatbuffers::Vector;
using internal::CheckFinite;
using internal::CheckName;
using internal::CheckSize;
using internal::FirstOf;
using internal::ReadMissReasons;
using internal::ReadName;
using internal::ReadReuse;
using internal::ReadString;
using internal::ReadTokens;
using internal::WriteMissReasons;
using internal::WriteReuse;
using internal::WriteString;
using internal::WriteTokens;

// ---- parts, written and read ----

Result<Offset<wire::ServerInfo>> WriteInfo(FlatBufferBuilder& builder, const ServerInfo& info) {
  // A model file or a driver may have a longer one; nobody should be without an answer for that.
  const auto name = [&builder](const std::string& text) {
    return WriteString(builder, FirstOf(text, wire::kMaxNameBytes));
  };
  const auto version = name(info.version);
  const auto model = name(info.model);
  const auto space = name(info.space);
  const auto dtype = name(info.dtype);
  const auto isa = name(info.isa);
  const auto device = name(info.device);
  return wire::CreateServerInfo(builder, version, model, space, dtype, isa, WriteReuse(info.reuse),
                                info.max_context_tokens, info.vocab_size, device);
}

Status ReadInfo(const wire::ServerInfo& in, ServerInfo* out) {
  KVS_RETURN_IF_ERROR(ReadName("version", in.version(), &out->version));
  KVS_RETURN_IF_ERROR(ReadName("model", in.model(), &out->model));
  KVS_RETURN_IF_ERROR(ReadName("space", in.space(), &out->space));
  KVS_RETURN_IF_ERROR(ReadName("dtype", in.dtype(), &out->dtype));
  KVS_RETURN_IF_ERROR(ReadName("isa", in.isa(), &out->isa));
  std::optional<ReuseMode> reuse;
  KVS_RETURN_IF_ERROR(ReadReuse(in.reuse(), &reuse));
  if (!reuse.has_value()) return InvalidArgument("the server's reuse mode is missing");
  out->reuse = *reuse;
  out->max_context_tokens = in.max_context_tokens();
  out->vocab_size = in.vocab_size();
  KVS_RETURN_IF_ERROR(ReadName("device", in.device(), &out->device));
  return OkStatus();
}

Status CheckTimings(const Timings& timings) {
  KVS_RETURN_IF_ERROR(CheckFinite("queue_ms", timings.queue_ms));
  KVS_RETURN_IF_ERROR(CheckFinite("ttft_ms", timings.ttft_ms));
  KVS_RETURN_IF_ERROR(CheckFinite("prompt_ms", timings.prompt_ms));
  return CheckFinite("predicted_ms", timings.predicted_ms);
}

// ---- messages, written ----

struct Writer {
  FlatBufferBuilder& builder;
  wire::ReplyBody type = wire::ReplyBody::NONE;
  Offset<void> body = 0;

  template <typename T>
  Status Put(wire::ReplyBody body_type, Offset<T> offset) {
    type = body_type;
    body = offset.Union();
    return OkStatus();
  }

  Status operator()(const HelloAck& ack) {
    KVS_ASSIGN_OR_RETURN(const auto info, WriteInfo(builder, ack.info));
    KVS_ASSIGN_OR_RETURN(const auto layout, internal::WriteLayout(builder, ack.layout));
    KVS_RETURN_IF_ERROR(CheckSize("socket path's size in bytes", ack.memory_socket.size(), wire::kMaxPathBytes));
    KVS_RETURN_IF_ERROR(CheckSize("ticket's size in bytes", ack.memory_ticket.size(), wire::kMaxTicketBytes));
    const auto limits = wire::CreateLimits(builder, ack.limits.text_bytes, ack.limits.tokens, ack.limits.name_bytes,
                                           ack.limits.streams);
    const auto socket = WriteString(builder, ack.memory_socket);
    const auto ticket = ack.memory_ticket.empty() ? 0 : builder.CreateVector(ack.memory_ticket);
    return Put(wire::ReplyBody::HelloAck,
               wire::CreateHelloAck(builder, info, ack.max_frame_bytes, limits, ack.protocol_version, ack.hash_version,
                                    layout, socket, ticket));
  }
  Status operator()(const Pong& pong) {
    Offset<wire::ServerInfo> info = 0;
    if (pong.info.has_value()) {
      KVS_ASSIGN_OR_RETURN(info, WriteInfo(builder, *pong.info));
    }
    return Put(wire::ReplyBody::Pong, wire::CreatePong(builder, info));
  }
  Status operator()(const Tokens& tokens) {
    KVS_RETURN_IF_ERROR(CheckSize("number of tokens", tokens.ids.size(), wire::kMaxTokens));
    const auto ids = WriteTokens(builder, tokens.ids);
    return Put(wire::ReplyBody::Tokens, wire::CreateTokens(builder, ids));
  }
  Status operator()(const Text& text) {
    KVS_RETURN_IF_ERROR(CheckSize("text's size in bytes", text.text.size(), wire::kMaxTextBytes));
    const auto offset = WriteString(builder, text.text);
    return Put(wire::ReplyBody::Text, wire::CreateText(builder, offset));
  }
  Status operator()(const RenderReply& rendered) {
    KVS_RETURN_IF_ERROR(CheckSize("prompt's size in bytes", rendered.prompt.size(), wire::kMaxTextBytes));
    KVS_RETURN_IF_ERROR(CheckSize("prompt's number of tokens", rendered.ids.size(), wire::kMaxTokens));
    const auto prompt = WriteString(builder, rendered.prompt);
    const auto ids = WriteTokens(builder, rendered.ids);
    return Put(wire::ReplyBody::Rendered, wire::CreateRendered(builder, prompt, ids));
  }
  Status operator()(const Accepted& accepted) {
    return Put(wire::ReplyBody::Accepted, wire::CreateAccepted(builder, accepted.request_id));
  }
  Status operator()(const TokenChunk& chunk) {
    KVS_RETURN_IF_ERROR(CheckSize("chunk's number of tokens", chunk.ids.size(), wire::kMaxTokens));
    KVS_RETURN_IF_ERROR(CheckSize("chunk's size in bytes", chunk.text.size(), wire::kMaxTextBytes));
    const auto ids = WriteTokens(builder, chunk.ids);
    const auto text = WriteString(builder, chunk.text);
    return Put(wire::ReplyBody::TokenChunk, wire::CreateTokenChunk(builder, ids, text));
  }
  Status operator()(const GenerateReply& reply) {
    KVS_RETURN_IF_ERROR(CheckSize("reply's number of tokens", reply.ids.size(), wire::kMaxTokens));
    KVS_RETURN_IF_ERROR(CheckSize("reply's size in bytes", reply.text.size(), wire::kMaxTextBytes));
    KVS_RETURN_IF_ERROR(CheckTimings(reply.timings));
    const auto ids = WriteTokens(builder, reply.ids);
    const auto text = WriteString(builder, reply.text);
    const ReuseReport& reuse = reply.reuse;
    KVS_ASSIGN_OR_RETURN(const auto reasons, WriteMissReasons(builder, reuse.miss_reasons));
    const auto report =
        wire::CreateReuseReport(builder, reuse.prefix_tokens, reuse.moved_tokens, reuse.recomputed_tokens,
                                reuse.fresh_tokens, reuse.approximate, reasons);
    const Timings& t = reply.timings;
    const auto timings = wire::CreateTimings(builder, t.queue_ms, t.ttft_ms, t.prompt_ms, t.predicted_ms);
    const auto finish = reply.finish_reason == FinishReason::kStop ? wire::Finish::Stop : wire::Finish::Length;
    return Put(wire::ReplyBody::Done,
               wire::CreateDone(builder, reply.request_id, ids, text, finish, reply.prompt_tokens, report, timings));
  }
  Status operator()(const Explanation& explanation) {
    KVS_RETURN_IF_ERROR(CheckSize("number of spans", explanation.spans.size(), wire::kMaxSpans));
    std::vector<Offset<wire::Span>> offsets;
    offsets.reserve(explanation.spans.size());
    for (const ExplainSpan& span : explanation.spans) {
      for (const std::string* name : {&span.kind, &span.source, &span.tier, &span.repair, &span.miss_reason}) {
        KVS_RETURN_IF_ERROR(CheckName("a name in a span", *name));
      }
      // Kinds, tiers and reasons repeat; shared strings keep long explanations small.
      const auto shared = [this](const std::string& name) {
        return name.empty() ? Offset<flatbuffers::String>(0) : builder.CreateSharedString(name);
      };
      const auto kind = shared(span.kind);
      const auto source = shared(span.source);
      const auto tier = shared(span.tier);
      const auto repair = shared(span.repair);
      const auto miss_reason = shared(span.miss_reason);
      offsets.push_back(wire::CreateSpan(builder, kind, span.start, span.length, source, tier, repair, miss_reason));
    }
    const auto spans = builder.CreateVector(offsets);
    return Put(wire::ReplyBody::Explanation, wire::CreateExplanation(builder, spans));
  }
  Status operator()(const Stats& stats) {
    KVS_ASSIGN_OR_RETURN(const auto offset, internal::WriteStats(builder, stats));
    return Put(wire::ReplyBody::Stats, offset);
  }
  Status operator()(const Match& m) {
    return Put(wire::ReplyBody::Match, wire::CreateMatch(builder, m.prompt_tokens, m.prefix_tokens, m.host_tokens,
                                                         m.cold_tokens, m.chunk_tokens));
  }
  Status operator()(const LeaseInfo& lease) {
    KVS_ASSIGN_OR_RETURN(const auto offset, internal::WriteLease(builder, lease));
    return Put(wire::ReplyBody::Leased, offset);
  }
  Status operator()(const PinInfo& pin) {
    KVS_RETURN_IF_ERROR(CheckName("a key", pin.key));
    const auto key = WriteString(builder, pin.key);
    return Put(wire::ReplyBody::Pinned, wire::CreatePinned(builder, key, pin.tokens));
  }
  Status operator()(const Count& count) { return Put(wire::ReplyBody::Count, wire::CreateCount(builder, count.count)); }
  Status operator()(const EntryList& list) {
    KVS_ASSIGN_OR_RETURN(const auto offset, internal::WriteEntries(builder, list));
    return Put(wire::ReplyBody::Entries, offset);
  }
  Status operator()(const Ack&) { return Put(wire::ReplyBody::Ack, wire::CreateAck(builder)); }
  Status operator()(const Status& status) {
    KVS_CHECK(!status.ok());
    const auto message = WriteString(builder, FirstOf(status.message(), wire::kMaxErrorBytes));
    return Put(wire::ReplyBody::Error, wire::CreateError(builder, static_cast<int>(status.code()), message));
  }
};

// ---- messages, read ----

Result<Reply> ReadHelloAck(const wire::HelloAck& in) {
  HelloAck ack;
  if (in.info() == nullptr) return InvalidArgument("a greeting without its content");
  KVS_RETURN_IF_ERROR(ReadInfo(*in.info(), &ack.info));
  ack.max_frame_bytes = in.max_frame_bytes();
  if (const wire::Limits* limits = in.limits()) {
    ack.limits = {.text_bytes = limits->text_bytes(),
                  .tokens = limits->tokens(),
                  .name_bytes = limits->name_bytes(),
                  .streams = limits->streams()};
  }
  ack.protocol_version = in.protocol_version();
  ack.hash_version = in.hash_version();
  KVS_RETURN_IF_ERROR(internal::ReadLayout(in.layout(), &ack.layout));
  KVS_RETURN_IF_ERROR(
      ReadString("socket path's size in bytes", in.memory_socket(), wire::kMaxPathBytes, &ack.memory_socket));
  if (const Vector<std::uint8_t>* ticket = in.memory_ticket()) {
    KVS_RETURN_IF_ERROR(CheckSize("ticket's size in bytes", ticket->size(), wire::kMaxTicketBytes));
    ack.memory_ticket.assign(ticket->begin(), ticket->end());
  }
  return Reply(std::move(ack));
}

template <typename T>
Result<Reply> AsReply(Result<T> message) {
  if (!message.ok()) return message.status();
  return Reply(*std::move(message));
}

Result<Reply> ReadDone(const wire::Done& in) {
  GenerateReply reply;
  reply.request_id = in.request_id();
  KVS_RETURN_IF_ERROR(ReadTokens("reply's number of tokens", in.ids(), &reply.ids));
  KVS_RETURN_IF_ERROR(ReadString("reply's size in bytes", in.text(), wire::kMaxTextBytes, &reply.text));
  switch (in.finish_reason()) {
    case wire::Finish::Stop: reply.finish_reason = FinishReason::kStop; break;
    case wire::Finish::Length: reply.finish_reason = FinishReason::kLength; break;
    default: return InvalidArgument("the finish reason is not known to this version");
  }
  reply.prompt_tokens = in.prompt_tokens();
  if (in.reuse() == nullptr || in.timings() == nullptr) return InvalidArgument("a reply without its reuse or timings");
  reply.reuse.prefix_tokens = in.reuse()->prefix_tokens();
  reply.reuse.moved_tokens = in.reuse()->moved_tokens();
  reply.reuse.recomputed_tokens = in.reuse()->recomputed_tokens();
  reply.reuse.fresh_tokens = in.reuse()->fresh_tokens();
  reply.reuse.approximate = in.reuse()->approximate();
  KVS_RETURN_IF_ERROR(ReadMissReasons(in.reuse()->miss_reasons(), &reply.reuse.miss_reasons));
  reply.timings = {.queue_ms = in.timings()->queue_ms(),
                   .ttft_ms = in.timings()->ttft_ms(),
                   .prompt_ms = in.timings()->prompt_ms(),
                   .predicted_ms = in.timings()->predicted_ms()};
  KVS_RETURN_IF_ERROR(CheckTimings(reply.timings));
  return Reply(std::move(reply));
}

Result<Reply> ReadExplanation(const wire::Explanation& in) {
  Explanation explanation;
  if (in.spans() == nullptr) return Reply(std::move(explanation));
  KVS_RETURN_IF_ERROR(CheckSize("number of spans", in.spans()->size(), wire::kMaxSpans));
  explanation.spans.reserve(in.spans()->size());
  for (const wire::Span* span : *in.spans()) {
    ExplainSpan& read = explanation.spans.emplace_back();
    KVS_RETURN_IF_ERROR(ReadName("span's kind", span->kind(), &read.kind));
    read.start = span->start();
    read.length = span->length();
    KVS_RETURN_IF_ERROR(ReadName("span's source", span->source(), &read.source));
    KVS_RETURN_IF_ERROR(ReadName("span's tier", span->tier(), &read.tier));
    KVS_RETURN_IF_ERROR(ReadName("span's repair", span->repair(), &read.repair));
    KVS_RETURN_IF_ERROR(ReadName("span's miss reason", span->miss_reason(), &read.miss_reason));
  }
  return Reply(std::move(explanation));
}

Result<Reply> ReadError(const wire::Error& in) {
  std::string message;
  KVS_RETURN_IF_ERROR(ReadString("error's size in bytes", in.message(), wire::kMaxErrorBytes, &message));
  if (in.code() < static_cast<int>(StatusCode::kInvalidArgument) ||
      in.code() > static_cast<int>(StatusCode::kInternal)) {
    return InvalidArgument("error code " + std::to_string(in.code()) + " is not known to this version");
  }
  return Reply(std::in_place_type<Status>, static_cast<StatusCode>(in.code()), std::move(message));
}

}  // namespace

Result<Frame> EncodeReply(std::uint64_t correlation, const Reply& reply) {
  FlatBufferBuilder builder(1024);
  Writer writer{builder};
  const Status written = std::visit(writer, reply);
  if (!written.ok()) return ResourceExhausted("the answer does not fit the wire: " + written.message());
  builder.Finish(wire::CreateReply(builder, writer.type, writer.body));
  return internal::MakeFrame(wire::FrameKind::kReply, correlation, builder);
}

Frame EncodeError(std::uint64_t correlation, const Status& status) {
  Result<Frame> frame = EncodeReply(correlation, Reply(status));
  KVS_CHECK(frame.ok());
  return *std::move(frame);
}

Result<Reply> DecodeReply(const wire::Reply& reply) {
  if (reply.body() == nullptr) return InvalidArgument("the reply's body is missing");
  switch (reply.body_type()) {
    case wire::ReplyBody::HelloAck: return ReadHelloAck(*reply.body_as_HelloAck());
    case wire::ReplyBody::Pong: {
      Pong pong;
      if (const wire::ServerInfo* info = reply.body_as_Pong()->info()) {
        KVS_RETURN_IF_ERROR(ReadInfo(*info, &pong.info.emplace()));
      }
      return Reply(std::move(pong));
    }
    case wire::ReplyBody::Tokens: {
      Tokens tokens;
      KVS_RETURN_IF_ERROR(ReadTokens("number of tokens", reply.body_as_Tokens()->ids(), &tokens.ids));
      return Reply(std::move(tokens));
    }
    case wire::ReplyBody::Text: {
      Text text;
      KVS_RETURN_IF_ERROR(
          ReadString("text's size in bytes", reply.body_as_Text()->text(), wire::kMaxTextBytes, &text.text));
      return Reply(std::move(text));
    }
    case wire::ReplyBody::Rendered: {
      RenderReply rendered;
      const wire::Rendered& in = *reply.body_as_Rendered();
      KVS_RETURN_IF_ERROR(ReadString("prompt's size in bytes", in.prompt(), wire::kMaxTextBytes, &rendered.prompt));
      KVS_RETURN_IF_ERROR(ReadTokens("prompt's number of tokens", in.ids(), &rendered.ids));
      return Reply(std::move(rendered));
    }
    case wire::ReplyBody::Accepted: return Reply(Accepted{.request_id = reply.body_as_Accepted()->request_id()});
    case wire::ReplyBody::TokenChunk: {
      TokenChunk chunk;
      const wire::TokenChunk& in = *reply.body_as_TokenChunk();
      KVS_RETURN_IF_ERROR(ReadTokens("chunk's number of tokens", in.ids(), &chunk.ids));
      KVS_RETURN_IF_ERROR(ReadString("chunk's size in bytes", in.text(), wire::kMaxTextBytes, &chunk.text));
      return Reply(std::move(chunk));
    }
    case wire::ReplyBody::Done: return ReadDone(*reply.body_as_Done());
    case wire::ReplyBody::Explanation: return ReadExplanation(*reply.body_as_Explanation());
    case wire::ReplyBody::Stats: return AsReply(internal::ReadStats(*reply.body_as_Stats()));
    case wire::ReplyBody::Match: {
      const wire::Match& in = *reply.body_as_Match();
      return Reply(Match{.prompt_tokens = in.prompt_tokens(),
                         .prefix_tokens = in.prefix_tokens(),
                         .host_tokens = in.host_tokens(),
                         .cold_tokens = in.cold_tokens(),
                         .chunk_tokens = in.chunk_tokens()});
    }
    case wire::ReplyBody::Leased: return AsReply(internal::ReadLease(*reply.body_as_Leased()));
    case wire::ReplyBody::Pinned: {
      PinInfo pin{.tokens = reply.body_as_Pinned()->tokens()};
      KVS_RETURN_IF_ERROR(ReadName("key", reply.body_as_Pinned()->key(), &pin.key));
      return Reply(std::move(pin));
    }
    case wire::ReplyBody::Count: return Reply(Count{.count = reply.body_as_Count()->count()});
    case wire::ReplyBody::Entries: return AsReply(internal::ReadEntries(*reply.body_as_Entries()));
    case wire::ReplyBody::Ack: return Reply(Ack{});
    case wire::ReplyBody::Error: return ReadError(*reply.body_as_Error());
    case wire::ReplyBody::NONE: return InvalidArgument("the reply's body is missing");
  }
  return Unimplemented("reply type " + std::to_string(static_cast<int>(reply.body_type())) +
                       " is not known to this version");
}

}  // namespace kvshare::codec
