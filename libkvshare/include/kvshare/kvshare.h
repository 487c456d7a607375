/* kvshare's C interface, for every language that can call C. Nothing of C++ and no exception crosses it.
 *
 * Rules. Every struct begins with struct_size, which the caller sets to sizeof the struct it was compiled with; later
 * versions only append fields. Texts are UTF-8, with a length where one is asked for. Memory that a function hands out
 * through a pointer to a pointer is freed by kvs_free, handles by their own function; NULL is freed by doing nothing. A
 * function that fails leaves its outputs alone, and kvs_last_error says why, in words. Clients may be used by many
 * threads at once; a lease or a stream by one at a time. After fork(), a client serves the child too, leases and
 * streams do not. */
#ifndef KVSHARE_KVSHARE_H_
#define KVSHARE_KVSHARE_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVS_ABI_VERSION 1 /* raised only by what old callers would misread */

typedef enum kvs_status {
  KVS_OK = 0,
  KVS_INVALID_ARGUMENT = 1,
  KVS_NOT_FOUND = 2,
  KVS_RESOURCE_EXHAUSTED = 3,
  KVS_UNAVAILABLE = 4,
  KVS_DEADLINE_EXCEEDED = 5,
  KVS_CANCELLED = 6,
  KVS_DATA_LOSS = 7,
  KVS_FAILED_PRECONDITION = 8,
  KVS_UNIMPLEMENTED = 9,
  KVS_INTERNAL = 10,
  KVS_END = 100 /* kvs_stream_next: the reply is complete */
} kvs_status;

/* kvshare::ReuseMode; KVS_REUSE_DEFAULT leaves it to the daemon. */
typedef enum kvs_reuse {
  KVS_REUSE_DEFAULT = 0,
  KVS_REUSE_OFF = 1,
  KVS_REUSE_EXACT = 2,
  KVS_REUSE_ROTATE = 3,
  KVS_REUSE_EPIC = 4,
  KVS_REUSE_CACHEBLEND = 5,
  KVS_REUSE_DHD = 6,
  KVS_REUSE_KVCOMM = 7,
  KVS_REUSE_AUTO = 8
} kvs_reuse;

typedef struct kvs_client kvs_client;
typedef struct kvs_lease kvs_lease;
typedef struct kvs_stream kvs_stream;

/* "0.1.0"; static. */
const char* kvs_version(void);
uint32_t kvs_abi_version(void);
/* Why this thread's last failing call failed; "" before any. Valid until this thread's next call. */
const char* kvs_last_error(void);
void kvs_free(void* memory);

/* ---- client ---- */

typedef struct kvs_options {
  size_t struct_size;
  const char* endpoint; /* ipc://PATH or tcp://HOST:PORT */
  int64_t timeout_ms;   /* of every call but kvs_generate; 0: 30 s */
} kvs_options;

/* Does not wait for the daemon: the first call does. */
kvs_status kvs_open(const kvs_options* options, kvs_client** client);
/* The client's leases end; where a stream is open, which may be read on, with that. Handles of either are freed by
 * their own functions, before or after. */
void kvs_close(kvs_client* client);

typedef struct kvs_server_info {
  size_t struct_size;
  int64_t max_context_tokens;
  int64_t vocab_size;
  int32_t reuse;    /* kvs_reuse */
  char version[32]; /* cut where longer, always terminated; so are the others */
  char model[256];
  char space[72]; /* hex digest of what makes KV comparable */
  char dtype[16];
  char isa[32];
} kvs_server_info;
kvs_status kvs_info(kvs_client* client, kvs_server_info* info);

kvs_status kvs_tokenize(kvs_client* client, const char* text, size_t text_len, int32_t** ids, size_t* num_ids);

/* A prompt: set one of text, ids, messages_json. */
typedef struct kvs_prompt {
  size_t struct_size;
  const char* text;
  size_t text_len;
  const int32_t* ids;
  size_t num_ids;
  const char* messages_json; /* OpenAI messages, an array */
  size_t messages_len;
  const char* tools_json; /* OpenAI tools, an array; NULL: none */
  size_t tools_len;
  int32_t no_generation_prompt; /* of messages: leave out the assistant's opening */
  const char* agent;            /* who asks; NULL: "default" */
  const char* session;          /* NULL: none */
} kvs_prompt;

/* The template applied to `prompt`, which must be messages. *text is terminated. */
kvs_status kvs_render(kvs_client* client, const kvs_prompt* prompt, char** text, size_t* text_len, int32_t** ids,
                      size_t* num_ids);

/* ---- stored KV ---- */

typedef struct kvs_match {
  size_t struct_size;
  int64_t prompt_tokens;
  int64_t prefix_tokens;
  int64_t host_tokens;
  int64_t cold_tokens;
  int64_t chunk_tokens;
} kvs_match;
kvs_status kvs_lookup(kvs_client* client, const kvs_prompt* prompt, kvs_match* match);

/* Leases what is stored of the prompt for ttl_ms (0: 30 s). KVS_NOT_FOUND when nothing is. */
kvs_status kvs_acquire(kvs_client* client, const kvs_prompt* prompt, int64_t ttl_ms, kvs_lease** lease);

typedef struct kvs_lease_info {
  size_t struct_size;
  int64_t tokens; /* leading tokens of the prompt */
  int64_t num_pages;
  int64_t page_bytes;
  int32_t page_tokens;
  int32_t num_layers;
  int32_t num_kv_heads;
  int32_t head_dim;
  char dtype[16]; /* float32 | bfloat16 | float16 */
} kvs_lease_info;
kvs_status kvs_lease_describe(const kvs_lease* lease, kvs_lease_info* info);

/* A page [layer][K|V][kv_head][page_tokens][head_dim], in the daemon's memory and read-only: valid until the lease is
 * released, and its content as long as kvs_lease_valid says so after it was read. */
typedef struct kvs_page {
  size_t struct_size;
  const void* data;
  size_t bytes;
  int64_t start; /* position of its first token */
  int32_t valid_tokens;
  uint64_t generation;
} kvs_page;
/* KVS_FAILED_PRECONDITION where the daemon shares no memory with this client. */
kvs_status kvs_lease_page(const kvs_lease* lease, size_t index, kvs_page* page);
/* 1 while the page holds what it did when it was leased, else 0. No round trip. */
int kvs_lease_valid(const kvs_lease* lease, size_t index);
void kvs_release(kvs_lease* lease);

/* ---- generation ---- */

typedef struct kvs_generate_request {
  size_t struct_size;
  const kvs_prompt* prompt;
  int32_t max_tokens; /* 0: the prompt's KV is computed and stored, nothing is generated */
  float temperature;  /* 0: greedy */
  int32_t top_k;      /* 0: no limit */
  float top_p;        /* 0: 1 */
  uint64_t seed;
  const char* const* stop; /* num_stop terminated strings */
  size_t num_stop;
  int32_t ignore_eos;
  int32_t reuse;      /* kvs_reuse */
  int64_t timeout_ms; /* 0: 5 minutes */
} kvs_generate_request;
kvs_status kvs_generate(kvs_client* client, const kvs_generate_request* request, kvs_stream** stream);

typedef struct kvs_chunk {
  size_t struct_size;
  const int32_t* ids; /* valid until the stream's next call */
  size_t num_ids;
  const char* text; /* whole characters, terminated; may lag behind the ids */
  size_t text_len;
} kvs_chunk;
/* KVS_OK with a piece, KVS_END when the reply is complete, else why it ended. */
kvs_status kvs_stream_next(kvs_stream* stream, kvs_chunk* chunk);
void kvs_stream_cancel(kvs_stream* stream);

typedef struct kvs_reply {
  size_t struct_size;
  const int32_t* ids; /* valid until kvs_stream_free */
  size_t num_ids;
  const char* text;
  size_t text_len;
  uint64_t request_id;
  int32_t finished_by_length; /* else by the model or a stop string */
  int32_t approximate;
  int64_t prompt_tokens; /* the four below add up to it */
  int64_t prefix_tokens;
  int64_t moved_tokens;
  int64_t recomputed_tokens;
  int64_t fresh_tokens;
  double queue_ms;
  double ttft_ms;
  double prompt_ms;
  double predicted_ms;
} kvs_reply;
/* KVS_FAILED_PRECONDITION before kvs_stream_next has returned KVS_END. */
kvs_status kvs_stream_reply(const kvs_stream* stream, kvs_reply* reply);
/* Cancels what is not complete. */
void kvs_stream_free(kvs_stream* stream);

/* ---- as JSON (docs/reference/kvctl.md has the shapes) ---- */

/* Of `prompt`, or of the earlier request `request_id` where that is not 0 (then prompt may be NULL). */
kvs_status kvs_explain_json(kvs_client* client, const kvs_prompt* prompt, uint64_t request_id, kvs_reuse reuse,
                            char** json);
kvs_status kvs_stats_json(kvs_client* client, char** json);

#ifdef __cplusplus
}
#endif

#endif /* KVSHARE_KVSHARE_H_ */
