// The service's front: what it accepts, what it refuses and how it says so; text in and out; the in-process client.
#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "agentd/in_process_client.h"
#include "agentd/service.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"
#include "tests/agentd/tiny_service.h"

namespace kvshare::testing {
namespace {

using kernels::DType;
using ::testing::HasSubstr;

class ServiceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    service_ = NewTinyService(DType::kF32);
    ASSERT_NE(service_, nullptr);
    client_ = agentd::NewInProcessClient(service_.get());
  }

  GenerateRequest Text(std::string prompt, int max_tokens) {
    GenerateRequest request;
    request.prompt = TextPrompt{std::move(prompt)};
    request.max_tokens = max_tokens;
    request.ignore_eos = true;
    return request;
  }

  void ExpectRefused(const GenerateRequest& request, const std::string& word) {
    const auto sink = std::make_shared<Recorder>();
    const Result<std::uint64_t> id = service_->Generate(request, sink);
    ASSERT_FALSE(id.ok()) << "accepted, expected a word about " << word;
    EXPECT_EQ(id.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(id.status().message(), HasSubstr(word));
  }

  std::unique_ptr<agentd::Service> service_;
  std::unique_ptr<Client> client_;
};

TEST_F(ServiceTest, SaysWhatItServes) {
  const Result<ServerInfo> info = client_->Ping(std::chrono::seconds(1));
  ASSERT_TRUE(info.ok());
  EXPECT_FALSE(info->version.empty());
  EXPECT_EQ(info->space.size(), 64u);
  EXPECT_EQ(info->dtype, "float32");
  EXPECT_FALSE(info->isa.empty());
  EXPECT_EQ(info->max_context_tokens, 1024);
  EXPECT_EQ(info->vocab_size, kTinyVocab);
}

TEST_F(ServiceTest, RefusesWhatCannotBeServedAndNamesIt) {
  ExpectRefused(IdsRequest({}, 4), "empty");
  ExpectRefused(Text("", 4), "empty");
  ExpectRefused(IdsRequest({5, -1}, 4), "id -1 at index 1");
  ExpectRefused(IdsRequest({kTinyVocab}, 4), std::to_string(kTinyVocab));
  ExpectRefused(IdsRequest(std::vector<TokenId>(1024, 5), 4), "the model's window is 1024 tokens");
  ExpectRefused(IdsRequest({5}, -1), "max_tokens");
  GenerateRequest request = IdsRequest({5}, 4);
  request.sampling.temperature = -1;
  ExpectRefused(request, "temperature");
  request.sampling.temperature = std::numeric_limits<float>::quiet_NaN();
  ExpectRefused(request, "temperature");
  request.sampling = {.top_k = -1};
  ExpectRefused(request, "top_k");
  request.sampling = {.top_p = 0};
  ExpectRefused(request, "top_p");
  request.sampling = {};
  request.stop = {""};
  ExpectRefused(request, "stop");
  request.stop.assign(1000, "x");
  ExpectRefused(request, "stop");
  request.stop.clear();
  request.timeout = std::chrono::milliseconds(0);
  ExpectRefused(request, "timeout");
  request.timeout = std::chrono::seconds(1);
  request.agent.assign(1000, 'a');
  ExpectRefused(request, "agent");
  request.agent = "two\nlines";
  ExpectRefused(request, "agent");
  request.agent.clear();
  request.session = "\xff";
  ExpectRefused(request, "session");
  request.session.clear();
  request.prompt = ChatPrompt{.messages_json = "{", .tools_json = ""};
  const Result<std::uint64_t> id = service_->Generate(request, std::make_shared<Recorder>());
  EXPECT_FALSE(id.ok());
  EXPECT_EQ(service_->GetStats().requests_waiting, 0);
}

TEST_F(ServiceTest, APromptOfTheWholeWindowButOneGetsOneToken) {
  const Result<GenerateReply> reply = client_->GenerateAll(IdsRequest(std::vector<TokenId>(1023, 5), 100));
  ASSERT_TRUE(reply.ok()) << reply.status().message();
  EXPECT_LE(reply->ids.size(), 1u);
}

TEST_F(ServiceTest, TextGoesInAndComesOutWhole) {
  const Result<GenerateReply> reply = client_->GenerateAll(Text("The lamp is in the hall.", 40));
  ASSERT_TRUE(reply.ok()) << reply.status().message();
  EXPECT_EQ(reply->ids.size(), 40u);
  EXPECT_EQ(reply->finish_reason, FinishReason::kLength);
  const Result<std::vector<TokenId>> ids = client_->Tokenize("The lamp is in the hall.");
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(reply->prompt_tokens, static_cast<std::int64_t>(ids->size()));
  const Result<std::string> text = client_->Detokenize(reply->ids);
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(reply->text, *text);
  EXPECT_EQ(client_->Detokenize(std::vector<TokenId>{kTinyVocab}).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(ServiceTest, ChunksJoinToTheReply) {
  Result<std::unique_ptr<TokenStream>> stream = client_->Generate(Text("Where is the ring?", 30));
  ASSERT_TRUE(stream.ok()) << stream.status().message();
  std::vector<TokenId> ids;
  std::string text;
  while (true) {
    const Result<std::optional<TokenChunk>> chunk = (*stream)->Next();
    ASSERT_TRUE(chunk.ok()) << chunk.status().message();
    if (!chunk->has_value()) break;
    ids.insert(ids.end(), (*chunk)->ids.begin(), (*chunk)->ids.end());
    text += (*chunk)->text;
  }
  EXPECT_EQ(ids, (*stream)->reply().ids);
  EXPECT_EQ(text, (*stream)->reply().text);
  const Result<std::optional<TokenChunk>> after = (*stream)->Next();
  ASSERT_TRUE(after.ok());
  EXPECT_FALSE(after->has_value());
}

TEST_F(ServiceTest, AStopStringEndsTheTextBeforeIt) {
  GenerateRequest request = Text("Where is the drum?", 60);
  request.sampling = {.temperature = 3, .seed = 5};  // so that it says many different things
  const Result<GenerateReply> whole = client_->GenerateAll(request);
  ASSERT_TRUE(whole.ok());
  // A piece from the middle that is plain ASCII, so that it is a string a person could have given.
  std::string stop;
  for (std::size_t i = whole->text.size() / 3; i + 2 <= whole->text.size() && stop.empty(); ++i) {
    const std::string piece = whole->text.substr(i, 2);
    if (piece[0] > ' ' && piece[0] < 127 && piece[1] > ' ' && piece[1] < 127) stop = piece;
  }
  ASSERT_FALSE(stop.empty()) << whole->text;
  request.stop = {"never said by a model of this size", stop};
  const Result<GenerateReply> cut = client_->GenerateAll(request);
  ASSERT_TRUE(cut.ok());
  EXPECT_EQ(cut->finish_reason, FinishReason::kStop);
  EXPECT_EQ(cut->text, whole->text.substr(0, whole->text.find(stop)));
  EXPECT_LT(cut->ids.size(), whole->ids.size());
}

TEST_F(ServiceTest, ChatsAreRenderedAsRenderSays) {
  const ChatPrompt chat = {.messages_json = R"([{"role":"user","content":"Hi"}])", .tools_json = ""};
  const Result<RenderReply> rendered = client_->Render({.chat = chat});
  ASSERT_TRUE(rendered.ok()) << rendered.status().message();
  EXPECT_THAT(rendered->prompt, HasSubstr("Hi"));
  GenerateRequest request = Text("", 5);
  request.prompt = chat;
  const Result<GenerateReply> first = client_->GenerateAll(request);
  ASSERT_TRUE(first.ok()) << first.status().message();
  EXPECT_EQ(first->prompt_tokens, static_cast<std::int64_t>(rendered->ids.size()));
  request.prompt = TokenPrompt{rendered->ids};
  const Result<GenerateReply> second = client_->GenerateAll(request);
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(second->reuse.prefix_tokens, first->prompt_tokens - 1);
  EXPECT_EQ(second->ids, first->ids);
}

TEST_F(ServiceTest, AStreamThatIsDroppedIsCancelled) {
  // 1,000 tokens are far more than are computed before the next line.
  { const auto stream = client_->Generate(Text("Where is the knife?", 1000)); }
  service_->Drain();
  const Stats stats = service_->GetStats();
  EXPECT_EQ(stats.totals.requests + stats.requests_failed, 1);
  EXPECT_EQ(stats.pool.leases, 0);
}

TEST_F(ServiceTest, ACancelledStreamSaysSo) {
  const auto stream = client_->Generate(Text("Where is the rope?", 1000));
  ASSERT_TRUE(stream.ok());
  (*stream)->Cancel();
  EXPECT_EQ((*stream)->Next().status().code(), StatusCode::kCancelled);
}

TEST_F(ServiceTest, ATimeoutEndsTheStream) {
  GenerateRequest request = Text("Where is the flute?", 1000);
  request.timeout = std::chrono::milliseconds(1);
  const Result<GenerateReply> reply = client_->GenerateAll(request);
  ASSERT_FALSE(reply.ok());
  EXPECT_EQ(reply.status().code(), StatusCode::kDeadlineExceeded);
}

TEST(NewServiceTest, APoolMustHoldOneContext) {
  const auto page_bytes = static_cast<std::int64_t>(LoadTinyModel(DType::kF32)->kv_layout().page_bytes());
  const auto too_small = agentd::NewService(LoadTinyModel(DType::kF32), {.kv_pool_bytes = 15 * page_bytes});
  ASSERT_FALSE(too_small.ok());
  EXPECT_EQ(too_small.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(too_small.status().message(), HasSubstr(std::to_string(16 * page_bytes)));
  EXPECT_TRUE(agentd::NewService(LoadTinyModel(DType::kF32), {.kv_pool_bytes = 16 * page_bytes}).ok());
  EXPECT_TRUE(agentd::NewService(LoadTinyModel(DType::kF32), {}).ok());
}

TEST(NewServiceTest, OptionsMustMakeSense) {
  for (const agentd::ServiceOptions& options :
       {agentd::ServiceOptions{.max_running = 0}, agentd::ServiceOptions{.max_waiting = 0},
        agentd::ServiceOptions{.prefill_chunk_tokens = 0}, agentd::ServiceOptions{.kv_pool_bytes = -1}}) {
    const auto service = agentd::NewService(LoadTinyModel(DType::kF32), options);
    ASSERT_FALSE(service.ok());
    EXPECT_EQ(service.status().code(), StatusCode::kInvalidArgument);
  }
}

// Qwen's models have some hundred rows more than their tokenizers have tokens. Half of what is drawn here is such.
TEST(PaddedModelTest, RowsWithoutATokenStandForNothing) {
  const auto service = agentd::NewService(LoadTinyModel(DType::kF32, 1024, 1, 2, kTinyVocab),
                                          {.kv_pool_bytes = 64 << 20, .seconds_per_token = 1});
  ASSERT_TRUE(service.ok()) << service.status().message();
  for (const ReuseMode mode : {ReuseMode::kExact, ReuseMode::kAuto}) {
    std::vector<TokenId> prompt(200, kTinyVocab + 7);
    for (int turn = 0; turn < 3; ++turn) {
      GenerateRequest request = IdsRequest(prompt, 40);
      request.reuse = mode;
      request.session = "s";
      request.ignore_eos = true;
      request.stop = {"no such text"};
      request.sampling = {.temperature = 100, .seed = 5};
      const GenerateReply reply = Ask(**service, request);
      ASSERT_EQ(reply.ids.size(), 40u);
      EXPECT_GT(std::count_if(reply.ids.begin(), reply.ids.end(), [](TokenId id) { return id >= kTinyVocab; }), 0);
      const Result<std::string> text = (*service)->Detokenize(reply.ids);
      ASSERT_TRUE(text.ok()) << text.status().message();
      EXPECT_EQ(reply.text, *text);
      prompt.insert(prompt.begin(), {kTinyVocab + 9, kTinyVocab + 10});
    }
  }
  EXPECT_FALSE((*service)->Detokenize(std::vector<TokenId>{2 * kTinyVocab}).ok());
}

TEST(TokenlessModelTest, TextNeedsATokenizerAndIdsDoNot) {
  TapeService tape;
  GenerateRequest request;
  request.prompt = TextPrompt{"x"};
  EXPECT_THAT(tape.service->Generate(request, std::make_shared<Recorder>()).status().message(), HasSubstr("send ids"));
  request.prompt = ChatPrompt{.messages_json = "[]", .tools_json = ""};
  EXPECT_FALSE(tape.service->Generate(request, std::make_shared<Recorder>()).ok());
  request = IdsRequest({1}, 2);
  request.stop = {"x"};
  EXPECT_FALSE(tape.service->Generate(request, std::make_shared<Recorder>()).ok());
  EXPECT_EQ(tape.Ask(IdsRequest({1}, 2)).ids.size(), 2u);
}

}  // namespace
}  // namespace kvshare::testing
