/* The C interface, from C: compiled as C11 and linked with libkvshare.so alone. Run by capi_test.cc's server, with its
 * endpoint as the argument; exit 0 when everything held. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kvshare/kvshare.h"

#define CHECK(expr)                                                                               \
  do {                                                                                            \
    if (!(expr)) {                                                                                \
      fprintf(stderr, "capi_test.c:%d: %s; last error: %s\n", __LINE__, #expr, kvs_last_error()); \
      exit(1);                                                                                    \
    }                                                                                             \
  } while (0)

static kvs_prompt Text(const char* text) {
  kvs_prompt prompt;
  memset(&prompt, 0, sizeof prompt);
  prompt.struct_size = sizeof prompt;
  prompt.text = text;
  prompt.text_len = strlen(text);
  prompt.agent = "c";
  return prompt;
}

static void Errors(kvs_client* client) {
  kvs_client* none = NULL;
  kvs_options options = {sizeof options, "nowhere", 0};
  CHECK(kvs_open(&options, &none) == KVS_INVALID_ARGUMENT && none == NULL);
  CHECK(strlen(kvs_last_error()) > 0);
  options.struct_size = 0;
  CHECK(kvs_open(&options, &none) == KVS_INVALID_ARGUMENT);
  CHECK(kvs_open(NULL, &none) == KVS_INVALID_ARGUMENT);
  kvs_match match = {sizeof match, 0, 0, 0, 0, 0};
  CHECK(kvs_lookup(NULL, NULL, &match) == KVS_INVALID_ARGUMENT);
  kvs_prompt both = Text("x");
  both.messages_json = "[]";
  CHECK(kvs_lookup(client, &both, &match) == KVS_INVALID_ARGUMENT);
  CHECK(strstr(kvs_last_error(), "one of") != NULL);
  options = (kvs_options){sizeof options, "ipc:///nowhere/at-all.sock", 200};
  CHECK(kvs_open(&options, &none) == KVS_OK);
  kvs_server_info info;
  memset(&info, 0, sizeof info);
  info.struct_size = sizeof info;
  const time_t begun = time(NULL);
  CHECK(kvs_info(none, &info) == KVS_UNAVAILABLE);
  CHECK(time(NULL) - begun < 20); /* the client's timeout, not one of its own */
  kvs_close(none);
  char* json = NULL;
  CHECK(kvs_explain_json(client, NULL, 99, KVS_REUSE_DEFAULT, &json) == KVS_NOT_FOUND && json == NULL);
  kvs_close(NULL);
  kvs_release(NULL);
  kvs_stream_free(NULL);
  kvs_stream_cancel(NULL);
  kvs_free(NULL);
}

static void Generation(kvs_client* client) {
  const kvs_prompt prompt = Text("hello");
  kvs_generate_request request;
  memset(&request, 0, sizeof request);
  request.struct_size = sizeof request;
  request.prompt = &prompt;
  request.max_tokens = 12;
  kvs_stream* stream = NULL;
  CHECK(kvs_generate(client, &request, &stream) == KVS_OK);
  kvs_reply reply;
  memset(&reply, 0, sizeof reply);
  reply.struct_size = sizeof reply;
  CHECK(kvs_stream_reply(stream, &reply) == KVS_FAILED_PRECONDITION);
  size_t tokens = 0;
  kvs_status status = KVS_OK;
  kvs_chunk chunk = {sizeof chunk, NULL, 0, NULL, 0};
  while ((status = kvs_stream_next(stream, &chunk)) == KVS_OK) {
    CHECK(strlen(chunk.text) == chunk.text_len);
    tokens += chunk.num_ids;
  }
  CHECK(status == KVS_END && tokens == 12);
  CHECK(kvs_stream_next(stream, &chunk) == KVS_END);
  CHECK(kvs_stream_reply(stream, &reply) == KVS_OK);
  CHECK(reply.num_ids == 12 && reply.ids[0] == 'h' && reply.prompt_tokens == 5 && reply.fresh_tokens == 5);
  CHECK(reply.finished_by_length == 1 && reply.text_len == 12);
  kvs_stream_free(stream);

  request.max_tokens = 1 << 16;
  CHECK(kvs_generate(client, &request, &stream) == KVS_OK);
  kvs_stream_cancel(stream);
  while ((status = kvs_stream_next(stream, &chunk)) == KVS_OK) {
  }
  CHECK(status == KVS_CANCELLED);
  kvs_stream_free(stream);
}

static void Stored(kvs_client* client) {
  kvs_prompt prompt = Text("a prompt that the echo has stored");
  kvs_match match = {sizeof match, 0, 0, 0, 0, 0};
  CHECK(kvs_lookup(client, &prompt, &match) == KVS_OK);
  CHECK(match.prompt_tokens == (int64_t)prompt.text_len && match.prefix_tokens == match.prompt_tokens - 1);
  /* A caller of an older version, whose struct ends early: only so far is written. */
  match.struct_size = offsetof(kvs_match, host_tokens);
  match.host_tokens = -7;
  CHECK(kvs_lookup(client, &prompt, &match) == KVS_OK && match.host_tokens == -7);

  kvs_lease* lease = NULL;
  CHECK(kvs_acquire(client, &prompt, 0, &lease) == KVS_OK);
  kvs_lease_info info;
  memset(&info, 0, sizeof info);
  info.struct_size = sizeof info;
  CHECK(kvs_lease_describe(lease, &info) == KVS_OK);
  CHECK(info.tokens == match.prompt_tokens && info.num_pages == 1 && strcmp(info.dtype, "float32") == 0);
  kvs_page page;
  memset(&page, 0, sizeof page);
  page.struct_size = sizeof page;
  CHECK(kvs_lease_page(lease, 0, &page) == KVS_OK);
  CHECK(page.bytes == (size_t)info.page_bytes && ((const unsigned char*)page.data)[7] == 1);
  CHECK(kvs_lease_valid(lease, 0) == 1 && kvs_lease_valid(lease, 1) == 0);
  CHECK(kvs_lease_page(lease, 1, &page) == KVS_INVALID_ARGUMENT);
  kvs_release(lease);
}

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  CHECK(kvs_abi_version() == KVS_ABI_VERSION);
  CHECK(strlen(kvs_version()) > 0);
  CHECK(strcmp(kvs_last_error(), "") == 0);
  kvs_client* client = NULL;
  const kvs_options options = {sizeof options, argv[1], 20000};
  CHECK(kvs_open(&options, &client) == KVS_OK);
  kvs_server_info info;
  memset(&info, 0, sizeof info);
  info.struct_size = sizeof info;
  CHECK(kvs_info(client, &info) == KVS_OK);
  CHECK(strcmp(info.model, "echo") == 0 && info.vocab_size == 256 && info.reuse == KVS_REUSE_OFF);
  int32_t* ids = NULL;
  size_t count = 0;
  CHECK(kvs_tokenize(client, "abc", 3, &ids, &count) == KVS_OK && count == 3 && ids[2] == 'c');
  kvs_free(ids);
  kvs_prompt chat = Text("");
  char* text = NULL;
  size_t length = 0;
  CHECK(kvs_render(client, &chat, &text, &length, &ids, &count) == KVS_INVALID_ARGUMENT);
  chat.text = NULL;
  chat.messages_json = "[1]";
  chat.messages_len = 3;
  CHECK(kvs_render(client, &chat, &text, &length, &ids, &count) == KVS_OK);
  CHECK(length == 3 && strcmp(text, "[1]") == 0 && count == 3);
  kvs_free(text);
  kvs_free(ids);
  Errors(client);
  Generation(client);
  Stored(client);
  char* json = NULL;
  CHECK(kvs_stats_json(client, &json) == KVS_OK && strstr(json, "\"agents\":{\"default\"") != NULL);
  kvs_free(json);
  const kvs_prompt prompt = Text("explain me");
  CHECK(kvs_explain_json(client, &prompt, 0, KVS_REUSE_EXACT, &json) == KVS_OK);
  CHECK(strstr(json, "\"kind\":\"fresh\"") != NULL && strstr(json, "\"length\":10") != NULL);
  kvs_free(json);
  kvs_close(client);
  puts("ok");
  return 0;
}
