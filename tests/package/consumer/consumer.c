/* A program outside the house, in C. */
#include <kvshare/kvshare.h>
#include <stdio.h>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const kvs_options options = {sizeof options, argv[1], 0};
  kvs_client* client = NULL;
  kvs_server_info info = {.struct_size = sizeof info};
  char* json = NULL;
  if (kvs_open(&options, &client) != KVS_OK || kvs_info(client, &info) != KVS_OK ||
      kvs_stats_json(client, &json) != KVS_OK) {
    fprintf(stderr, "%s\n", kvs_last_error());
    return 1;
  }
  printf("model %s stats %s\n", info.model, json);
  kvs_free(json);
  kvs_close(client);
  return 0;
}
