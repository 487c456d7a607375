// Context and Session: what the daemon gets to see of them.
#include "kvshare/session.h"

#include <gtest/gtest.h>

#include <string>

#include "agentd/server/router_server.h"
#include "tests/testing/echo_service.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace kvshare {
namespace {

TEST(ContextTest, SegmentsBecomeMessagesInOrder) {
  Context context;
  EXPECT_TRUE(context.empty());
  EXPECT_EQ(context.ToChat().messages_json, "[]");
  context.Append("system", "Be brief.").Append({.role = "user", .content = "a \"b\"\\\n\x01 \xC3\xA9", .name = "bob"});
  EXPECT_EQ(context.size(), 2u);
  EXPECT_EQ(context.ToChat().messages_json, R"([{"role":"system","content":"Be brief."},)"
                                            R"({"role":"user","name":"bob","content":"a \"b\"\\\u000a\u0001 )"
                                            "\xC3\xA9\"}]");
  EXPECT_TRUE(context.ToChat().add_generation_prompt);
  EXPECT_FALSE(context.ToChat(false).add_generation_prompt);
}

TEST(ContextTest, AForkGoesItsOwnWay) {
  Context context;
  context.Append("user", "one");
  Context fork = context;
  fork.Append("assistant", "two");
  context.Append("assistant", "other");
  EXPECT_EQ(fork.size(), 2u);
  EXPECT_EQ(fork.segments()[0].content, "one");
  EXPECT_EQ(fork.segments()[1].content, "two");
  EXPECT_EQ(context.segments()[1].content, "other");
}

TEST(ContextTest, AVeryLongContextIsDroppedWithoutAStackForEachSegment) {
  Context context;
  for (int i = 0; i < 500000; ++i) context.Append("user", "x");
  Context fork = context;
  fork.Append("user", "y");
  context = Context();
  EXPECT_EQ(fork.size(), 500001u);
  fork = Context();
}

TEST(SessionTest, RequestsCarryWhoAsks) {
  kvshare::testing::TempDir dir;
  kvshare::testing::EchoService service;
  const auto server = agentd::StartRouterServer(&service, {.endpoint = "ipc://" + dir.File("d.sock")});
  ASSERT_TRUE(server.ok()) << server.status().message();
  const auto client = Connect({.endpoint = (*server)->endpoint()});
  KVS_ASSERT_OK(client);
  Session session(client->get(),
                  {.agent = "planner", .session = "s1", .tools_json = "[{}]", .reuse = ReuseMode::kExact});
  Context context;
  context.Append("user", "hi");
  const auto reply = session.GenerateAll(context, {.max_tokens = 3});
  KVS_ASSERT_OK(reply);
  EXPECT_EQ(reply->ids.size(), 3u);
  const GenerateRequest seen = service.last_request();
  EXPECT_EQ(std::get<ChatPrompt>(seen.prompt).messages_json, context.ToChat().messages_json);
  EXPECT_EQ(std::get<ChatPrompt>(seen.prompt).tools_json, "[{}]");
  EXPECT_EQ(seen.agent, "planner");
  EXPECT_EQ(seen.session, "s1");
  EXPECT_EQ(seen.reuse, ReuseMode::kExact);
  KVS_ASSERT_OK(session.Generate(context, {.max_tokens = 1, .reuse = ReuseMode::kOff}));
  EXPECT_EQ(service.last_request().reuse, ReuseMode::kOff);

  KVS_ASSERT_OK(session.Put(context));
  EXPECT_EQ(service.last_request().max_tokens, 0);
  const auto match = session.Lookup(context);
  KVS_ASSERT_OK(match);
  EXPECT_EQ(match->prompt_tokens, static_cast<std::int64_t>(context.ToChat().messages_json.size()));
  const auto lease = session.Acquire(context);
  KVS_ASSERT_OK(lease);
  EXPECT_EQ(lease->tokens(), match->prompt_tokens);
  KVS_ASSERT_OK(session.Explain(context));
}

}  // namespace
}  // namespace kvshare
