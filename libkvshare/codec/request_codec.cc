// Requests: structs <-> frames.
#include <utility>

#include "libkvshare/codec/codec.h"
#include "libkvshare/codec/fields.h"

namespace kvshare::codec {
namespace {

using flatbuffers::FlatBufferBuilder;
using internal::CheckFinite;
using internal::CheckName;
using internal::CheckSize;
using internal::ReadName;
using internal::ReadReuse;
using internal::ReadString;
using internal::ReadTokens;
using internal::WriteReuse;
using internal::WriteString;
using internal::WriteTokens;

using AnyOffset = flatbuffers::Offset<void>;

// ---- checks that hold on both ways ----

Status CheckTimeout(std::int64_t ms) {
  if (ms < 0 || ms > wire::kMaxTimeoutMs) {
    return InvalidArgument("timeout of " + std::to_string(ms) + " ms is not within 0.." +
                           std::to_string(wire::kMaxTimeoutMs));
  }
  return OkStatus();
}

Status CheckChat(const ChatPrompt& chat) {
  KVS_RETURN_IF_ERROR(CheckSize("messages' size in bytes", chat.messages_json.size(), wire::kMaxTextBytes));
  return CheckSize("tools' size in bytes", chat.tools_json.size(), wire::kMaxToolsBytes);
}

Status CheckPrompt(const Prompt& prompt) {
  if (const auto* text = std::get_if<TextPrompt>(&prompt)) {
    return CheckSize("prompt's size in bytes", text->text.size(), wire::kMaxTextBytes);
  }
  if (const auto* tokens = std::get_if<TokenPrompt>(&prompt)) {
    return CheckSize("prompt's number of tokens", tokens->ids.size(), wire::kMaxTokens);
  }
  return CheckChat(std::get<ChatPrompt>(prompt));
}

Status CheckNames(const std::string& agent, const std::string& session) {
  KVS_RETURN_IF_ERROR(CheckSize("agent name's size in bytes", agent.size(), wire::kMaxNameBytes));
  return CheckSize("session name's size in bytes", session.size(), wire::kMaxNameBytes);
}

Status CheckGenerate(const GenerateRequest& request) {
  KVS_RETURN_IF_ERROR(CheckFinite("temperature", request.sampling.temperature));
  KVS_RETURN_IF_ERROR(CheckFinite("top_p", request.sampling.top_p));
  KVS_RETURN_IF_ERROR(CheckSize("number of stop strings", request.stop.size(), wire::kMaxStops));
  for (const std::string& stop : request.stop) {
    KVS_RETURN_IF_ERROR(CheckSize("stop string's size in bytes", stop.size(), wire::kMaxStopBytes));
  }
  KVS_RETURN_IF_ERROR(CheckNames(request.agent, request.session));
  return CheckTimeout(request.timeout.count());
}

Status CheckLimit(std::int64_t limit) {
  if (limit < 0 || limit > static_cast<std::int64_t>(wire::kMaxEntries)) {
    return InvalidArgument("a limit of " + std::to_string(limit) + " entries is not within 0.." +
                           std::to_string(wire::kMaxEntries));
  }
  return OkStatus();
}

Status CheckCredit(std::uint32_t chunks) { return CheckSize("credit", chunks, wire::kMaxCredit); }

// ---- writing ----

flatbuffers::Offset<wire::ChatPrompt> WriteChat(FlatBufferBuilder& builder, const ChatPrompt& chat) {
  const auto messages = WriteString(builder, chat.messages_json);
  const auto tools = WriteString(builder, chat.tools_json);
  return wire::CreateChatPrompt(builder, messages, tools, chat.add_generation_prompt);
}

std::pair<wire::Prompt, AnyOffset> WritePrompt(FlatBufferBuilder& builder, const Prompt& prompt) {
  if (const auto* text = std::get_if<TextPrompt>(&prompt)) {
    const auto offset = WriteString(builder, text->text);
    return {wire::Prompt::TextPrompt, wire::CreateTextPrompt(builder, offset).Union()};
  }
  if (const auto* tokens = std::get_if<TokenPrompt>(&prompt)) {
    const auto offset = WriteTokens(builder, tokens->ids);
    return {wire::Prompt::TokenPrompt, wire::CreateTokenPrompt(builder, offset).Union()};
  }
  return {wire::Prompt::ChatPrompt, WriteChat(builder, std::get<ChatPrompt>(prompt)).Union()};
}

// One Write per message: checks, builds the table, and tells its place in the union.
struct Writer {
  FlatBufferBuilder& builder;
  wire::RequestBody type = wire::RequestBody::NONE;
  AnyOffset body = 0;

  template <typename T>
  Status Put(wire::RequestBody body_type, flatbuffers::Offset<T> offset) {
    type = body_type;
    body = offset.Union();
    return OkStatus();
  }

  Status operator()(const Hello& hello) {
    KVS_RETURN_IF_ERROR(CheckSize("client name's size in bytes", hello.client.size(), wire::kMaxNameBytes));
    const auto client = WriteString(builder, hello.client);
    return Put(wire::RequestBody::Hello, wire::CreateHello(builder, client));
  }
  Status operator()(const Ping&) { return Put(wire::RequestBody::Ping, wire::CreatePing(builder)); }
  Status operator()(const Tokenize& tokenize) {
    KVS_RETURN_IF_ERROR(CheckSize("text's size in bytes", tokenize.text.size(), wire::kMaxTextBytes));
    const auto text = WriteString(builder, tokenize.text);
    return Put(wire::RequestBody::Tokenize, wire::CreateTokenize(builder, text));
  }
  Status operator()(const Detokenize& detokenize) {
    KVS_RETURN_IF_ERROR(CheckSize("number of tokens", detokenize.ids.size(), wire::kMaxTokens));
    const auto ids = WriteTokens(builder, detokenize.ids);
    return Put(wire::RequestBody::Detokenize, wire::CreateDetokenize(builder, ids));
  }
  Status operator()(const RenderRequest& render) {
    KVS_RETURN_IF_ERROR(CheckChat(render.chat));
    const auto chat = WriteChat(builder, render.chat);
    return Put(wire::RequestBody::Render, wire::CreateRender(builder, chat));
  }
  Status operator()(const Generate& generate) {
    const GenerateRequest& request = generate.request;
    KVS_RETURN_IF_ERROR(CheckPrompt(request.prompt));
    KVS_RETURN_IF_ERROR(CheckGenerate(request));
    KVS_RETURN_IF_ERROR(CheckCredit(generate.credit));
    const auto [prompt_type, prompt] = WritePrompt(builder, request.prompt);
    const auto stop = request.stop.empty() ? 0 : builder.CreateVectorOfStrings(request.stop);
    const auto agent = WriteString(builder, request.agent);
    const auto session = WriteString(builder, request.session);
    return Put(wire::RequestBody::Generate,
               wire::CreateGenerate(builder, prompt_type, prompt, request.sampling.temperature, request.sampling.top_k,
                                    request.sampling.top_p, request.sampling.seed, request.max_tokens, stop,
                                    request.ignore_eos, agent, session, WriteReuse(request.reuse),
                                    request.timeout.count(), generate.credit));
  }
  Status operator()(const Cancel& cancel) {
    return Put(wire::RequestBody::Cancel, wire::CreateCancel(builder, cancel.target));
  }
  Status operator()(const ExplainRequest& explain) {
    KVS_RETURN_IF_ERROR(CheckPrompt(explain.prompt));
    KVS_RETURN_IF_ERROR(CheckNames(explain.agent, explain.session));
    const auto [prompt_type, prompt] = WritePrompt(builder, explain.prompt);
    const auto agent = WriteString(builder, explain.agent);
    const auto session = WriteString(builder, explain.session);
    return Put(wire::RequestBody::Explain, wire::CreateExplain(builder, prompt_type, prompt, explain.request_id, agent,
                                                               session, WriteReuse(explain.reuse)));
  }
  Status operator()(const GetStats&) { return Put(wire::RequestBody::GetStats, wire::CreateGetStats(builder)); }
  Status operator()(const Credit& credit) {
    KVS_RETURN_IF_ERROR(CheckCredit(credit.chunks));
    return Put(wire::RequestBody::Credit, wire::CreateCredit(builder, credit.target, credit.chunks));
  }

  // Lookup and Prefetch differ in name alone.
  Status PutLookup(const LookupRequest& lookup, wire::RequestBody body_type) {
    KVS_RETURN_IF_ERROR(CheckPrompt(lookup.prompt));
    KVS_RETURN_IF_ERROR(CheckNames(lookup.agent, lookup.session));
    const auto [prompt_type, prompt] = WritePrompt(builder, lookup.prompt);
    const auto agent = WriteString(builder, lookup.agent);
    const auto session = WriteString(builder, lookup.session);
    if (body_type == wire::RequestBody::Lookup) {
      return Put(body_type, wire::CreateLookup(builder, prompt_type, prompt, agent, session));
    }
    return Put(body_type, wire::CreatePrefetch(builder, prompt_type, prompt, agent, session));
  }
  Status operator()(const LookupRequest& lookup) { return PutLookup(lookup, wire::RequestBody::Lookup); }
  Status operator()(const Prefetch& prefetch) { return PutLookup(prefetch.lookup, wire::RequestBody::Prefetch); }
  Status operator()(const AcquireRequest& acquire) {
    KVS_RETURN_IF_ERROR(CheckPrompt(acquire.prompt));
    KVS_RETURN_IF_ERROR(CheckNames(acquire.agent, acquire.session));
    KVS_RETURN_IF_ERROR(CheckTimeout(acquire.ttl.count()));
    const auto [prompt_type, prompt] = WritePrompt(builder, acquire.prompt);
    const auto agent = WriteString(builder, acquire.agent);
    const auto session = WriteString(builder, acquire.session);
    return Put(wire::RequestBody::Acquire,
               wire::CreateAcquire(builder, prompt_type, prompt, agent, session, acquire.ttl.count()));
  }
  Status operator()(const Release& release) {
    return Put(wire::RequestBody::Release, wire::CreateRelease(builder, release.lease));
  }
  Status operator()(const PinRequest& pin) {
    KVS_RETURN_IF_ERROR(CheckPrompt(pin.prompt));
    KVS_RETURN_IF_ERROR(CheckTimeout(pin.ttl.count()));
    const auto [prompt_type, prompt] = WritePrompt(builder, pin.prompt);
    return Put(wire::RequestBody::Pin, wire::CreatePin(builder, prompt_type, prompt, pin.ttl.count()));
  }
  Status operator()(const Unpin& unpin) {
    KVS_RETURN_IF_ERROR(CheckName("key", unpin.key));
    const auto key = WriteString(builder, unpin.key);
    return Put(wire::RequestBody::Unpin, wire::CreateUnpin(builder, key));
  }
  Status operator()(const EvictRequest& evict) {
    KVS_RETURN_IF_ERROR(CheckName("key", evict.key));
    const auto key = WriteString(builder, evict.key);
    return Put(wire::RequestBody::Evict, wire::CreateEvict(builder, key, evict.host, evict.cold));
  }
  Status operator()(const EntriesRequest& entries) {
    KVS_RETURN_IF_ERROR(CheckName("key", entries.key));
    KVS_RETURN_IF_ERROR(CheckLimit(entries.limit));
    const auto key = WriteString(builder, entries.key);
    return Put(wire::RequestBody::ListEntries, wire::CreateListEntries(builder, key, entries.limit));
  }
  Status operator()(const Drain&) { return Put(wire::RequestBody::Drain, wire::CreateDrain(builder)); }
};

// ---- reading ----

Status ReadChat(const wire::ChatPrompt* in, ChatPrompt* out) {
  if (in == nullptr) return InvalidArgument("a chat prompt is missing");
  KVS_RETURN_IF_ERROR(
      ReadString("messages' size in bytes", in->messages_json(), wire::kMaxTextBytes, &out->messages_json));
  KVS_RETURN_IF_ERROR(ReadString("tools' size in bytes", in->tools_json(), wire::kMaxToolsBytes, &out->tools_json));
  out->add_generation_prompt = in->add_generation_prompt();
  return OkStatus();
}

// T is any table with a Prompt union named `prompt`.
template <typename T>
Status ReadPrompt(const T& in, Prompt* out) {
  if (in.prompt() == nullptr) return InvalidArgument("the prompt is missing");
  switch (in.prompt_type()) {
    case wire::Prompt::TextPrompt:
      return ReadString("prompt's size in bytes", in.prompt_as_TextPrompt()->text(), wire::kMaxTextBytes,
                        &out->emplace<TextPrompt>().text);
    case wire::Prompt::TokenPrompt:
      return ReadTokens("prompt's number of tokens", in.prompt_as_TokenPrompt()->ids(),
                        &out->emplace<TokenPrompt>().ids);
    case wire::Prompt::ChatPrompt: return ReadChat(in.prompt_as_ChatPrompt(), &out->emplace<ChatPrompt>());
    case wire::Prompt::NONE: return InvalidArgument("the prompt is missing");
  }
  return Unimplemented("prompt type " + std::to_string(static_cast<int>(in.prompt_type())) +
                       " is not known to this version");
}

template <typename T>
Status ReadNames(const T& in, std::string* agent, std::string* session) {
  KVS_RETURN_IF_ERROR(ReadString("agent name's size in bytes", in.agent(), wire::kMaxNameBytes, agent));
  return ReadString("session name's size in bytes", in.session(), wire::kMaxNameBytes, session);
}

Result<Request> ReadGenerate(const wire::Generate& in) {
  Generate generate;
  GenerateRequest& request = generate.request;
  KVS_RETURN_IF_ERROR(ReadPrompt(in, &request.prompt));
  request.sampling = {.temperature = in.temperature(), .top_k = in.top_k(), .top_p = in.top_p(), .seed = in.seed()};
  request.max_tokens = in.max_tokens();
  if (in.stop() != nullptr) {
    KVS_RETURN_IF_ERROR(CheckSize("number of stop strings", in.stop()->size(), wire::kMaxStops));
    for (const flatbuffers::String* stop : *in.stop()) {
      KVS_RETURN_IF_ERROR(
          ReadString("stop string's size in bytes", stop, wire::kMaxStopBytes, &request.stop.emplace_back()));
    }
  }
  request.ignore_eos = in.ignore_eos();
  KVS_RETURN_IF_ERROR(ReadNames(in, &request.agent, &request.session));
  KVS_RETURN_IF_ERROR(ReadReuse(in.reuse(), &request.reuse));
  request.timeout = std::chrono::milliseconds(in.timeout_ms());
  generate.credit = in.credit();
  KVS_RETURN_IF_ERROR(CheckGenerate(request));
  KVS_RETURN_IF_ERROR(CheckCredit(generate.credit));
  return Request(std::move(generate));
}

Result<Request> ReadExplain(const wire::Explain& in) {
  ExplainRequest request;
  KVS_RETURN_IF_ERROR(ReadPrompt(in, &request.prompt));
  request.request_id = in.request_id();
  KVS_RETURN_IF_ERROR(ReadNames(in, &request.agent, &request.session));
  KVS_RETURN_IF_ERROR(ReadReuse(in.reuse(), &request.reuse));
  return Request(std::move(request));
}

template <typename T>
Result<LookupRequest> ReadLookup(const T& in) {
  LookupRequest request;
  KVS_RETURN_IF_ERROR(ReadPrompt(in, &request.prompt));
  KVS_RETURN_IF_ERROR(ReadNames(in, &request.agent, &request.session));
  return request;
}

Result<Request> ReadAcquire(const wire::Acquire& in) {
  AcquireRequest request;
  KVS_RETURN_IF_ERROR(ReadPrompt(in, &request.prompt));
  KVS_RETURN_IF_ERROR(ReadNames(in, &request.agent, &request.session));
  KVS_RETURN_IF_ERROR(CheckTimeout(in.ttl_ms()));
  request.ttl = std::chrono::milliseconds(in.ttl_ms());
  return Request(std::move(request));
}

Result<Request> ReadPin(const wire::Pin& in) {
  PinRequest request;
  KVS_RETURN_IF_ERROR(ReadPrompt(in, &request.prompt));
  KVS_RETURN_IF_ERROR(CheckTimeout(in.ttl_ms()));
  request.ttl = std::chrono::milliseconds(in.ttl_ms());
  return Request(std::move(request));
}

}  // namespace

Result<Frame> EncodeRequest(std::uint64_t correlation, const Request& request) {
  FlatBufferBuilder builder(1024);
  Writer writer{builder};
  KVS_RETURN_IF_ERROR(std::visit(writer, request));
  builder.Finish(wire::CreateRequest(builder, writer.type, writer.body));
  return internal::MakeFrame(wire::FrameKind::kRequest, correlation, builder);
}

Result<Request> DecodeRequest(const wire::Request& request) {
  if (request.body() == nullptr) return InvalidArgument("the request's body is missing");
  switch (request.body_type()) {
    case wire::RequestBody::Hello: {
      Hello hello;
      KVS_RETURN_IF_ERROR(ReadString("client name's size in bytes", request.body_as_Hello()->client(),
                                     wire::kMaxNameBytes, &hello.client));
      return Request(std::move(hello));
    }
    case wire::RequestBody::Ping: return Request(Ping{});
    case wire::RequestBody::Tokenize: {
      Tokenize tokenize;
      KVS_RETURN_IF_ERROR(
          ReadString("text's size in bytes", request.body_as_Tokenize()->text(), wire::kMaxTextBytes, &tokenize.text));
      return Request(std::move(tokenize));
    }
    case wire::RequestBody::Detokenize: {
      Detokenize detokenize;
      KVS_RETURN_IF_ERROR(ReadTokens("number of tokens", request.body_as_Detokenize()->ids(), &detokenize.ids));
      return Request(std::move(detokenize));
    }
    case wire::RequestBody::Render: {
      RenderRequest render;
      KVS_RETURN_IF_ERROR(ReadChat(request.body_as_Render()->chat(), &render.chat));
      return Request(std::move(render));
    }
    case wire::RequestBody::Generate: return ReadGenerate(*request.body_as_Generate());
    case wire::RequestBody::Cancel: return Request(Cancel{.target = request.body_as_Cancel()->target()});
    case wire::RequestBody::Explain: return ReadExplain(*request.body_as_Explain());
    case wire::RequestBody::GetStats: return Request(GetStats{});
    case wire::RequestBody::Credit: {
      const wire::Credit& credit = *request.body_as_Credit();
      KVS_RETURN_IF_ERROR(CheckCredit(credit.chunks()));
      return Request(Credit{.target = credit.target(), .chunks = credit.chunks()});
    }
    case wire::RequestBody::Lookup: {
      KVS_ASSIGN_OR_RETURN(LookupRequest lookup, ReadLookup(*request.body_as_Lookup()));
      return Request(std::move(lookup));
    }
    case wire::RequestBody::Prefetch: {
      KVS_ASSIGN_OR_RETURN(LookupRequest lookup, ReadLookup(*request.body_as_Prefetch()));
      return Request(Prefetch{.lookup = std::move(lookup)});
    }
    case wire::RequestBody::Acquire: return ReadAcquire(*request.body_as_Acquire());
    case wire::RequestBody::Release: return Request(Release{.lease = request.body_as_Release()->lease()});
    case wire::RequestBody::Pin: return ReadPin(*request.body_as_Pin());
    case wire::RequestBody::Unpin: {
      Unpin unpin;
      KVS_RETURN_IF_ERROR(ReadName("key's size in bytes", request.body_as_Unpin()->key(), &unpin.key));
      return Request(std::move(unpin));
    }
    case wire::RequestBody::Evict: {
      const wire::Evict& in = *request.body_as_Evict();
      EvictRequest evict{.host = in.host(), .cold = in.cold()};
      KVS_RETURN_IF_ERROR(ReadName("key's size in bytes", in.key(), &evict.key));
      return Request(std::move(evict));
    }
    case wire::RequestBody::ListEntries: {
      const wire::ListEntries& in = *request.body_as_ListEntries();
      EntriesRequest entries{.limit = in.limit()};
      KVS_RETURN_IF_ERROR(ReadName("key's size in bytes", in.key(), &entries.key));
      KVS_RETURN_IF_ERROR(CheckLimit(entries.limit));
      return Request(std::move(entries));
    }
    case wire::RequestBody::Drain: return Request(Drain{});
    case wire::RequestBody::NONE: return InvalidArgument("the request's body is missing");
  }
  return Unimplemented("request type " + std::to_string(static_cast<int>(request.body_type())) +
                       " is not known to this version");
}

}  // namespace kvshare::codec
