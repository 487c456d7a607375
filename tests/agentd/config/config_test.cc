// Settings: layers, strictness, messages that name file and line; and that the documents list every key.
#include "agentd/config/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <set>
#include <sstream>

#include "agentd/config/yaml_reader.h"
#include "agentd/pool/eviction_policy.h"
#include "tests/testing/status_matchers.h"

namespace kvshare::agentd {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kWhole[] = R"(# every key there is
version: 1
model:
  path: models/x
  lora: adapters/y
  dtype: float32
  device: auto
  threads: 3
server:
  listen: ipc:///run/kvshare.sock
  http: 127.0.0.1:8000
  max_running: 4
  max_waiting: 5
  prefill_chunk: 6
pool: {size: 1GiB, eviction: lru}
cold:
  dir: "/var/cache/kv share"
  size: 2GiB
reuse:
  mode: off
  blend_recompute: 0.25
  blend_filter: gradual
  exact_agents: judge, critic
  anchor_memory: 3GiB
observe:
  log: warn
)";

std::size_t Key(const char* key) {
  const std::size_t option = FindOption(key);
  EXPECT_NE(option, kNoOption) << key;
  return option;
}

// What a file holding `text` is refused with; empty when it is not.
std::string Refusal(const std::string& text) {
  Settings settings;
  return settings.AddFile(text, "f.yaml").message();
}

TEST(ConfigTest, AFileSetsEverything) {
  Settings settings;
  KVS_ASSERT_OK(settings.AddFile(kWhole, "f.yaml"));
  const Result<Config> config = settings.Finish();
  KVS_ASSERT_OK(config);
  EXPECT_EQ(config->model, "models/x");
  EXPECT_EQ(config->lora, "adapters/y");
  EXPECT_EQ(config->dtype, "float32");
  EXPECT_EQ(config->device, "auto");
  EXPECT_EQ(config->threads, 3);
  EXPECT_EQ(config->listen, "ipc:///run/kvshare.sock");
  EXPECT_EQ(config->http_host, "127.0.0.1");
  EXPECT_EQ(config->http_port, 8000);
  EXPECT_EQ(config->max_running, 4);
  EXPECT_EQ(config->max_waiting, 5);
  EXPECT_EQ(config->prefill_chunk, 6);
  EXPECT_EQ(config->pool_bytes, 1 << 30);
  EXPECT_EQ(config->eviction, "lru");
  EXPECT_EQ(config->cold_dir, "/var/cache/kv share");
  EXPECT_EQ(config->cold_bytes, std::int64_t{2} << 30);
  EXPECT_EQ(config->reuse, ReuseMode::kOff);
  EXPECT_EQ(config->blend_recompute, 0.25);
  EXPECT_TRUE(config->blend_gradual);
  EXPECT_EQ(config->exact_agents, (std::vector<std::string>{"judge", "critic"}));
  EXPECT_EQ(config->anchor_memory, std::int64_t{3} << 30);
  EXPECT_EQ(config->log_level, LogLevel::kWarn);
  // The file above is complete: a key that this test forgets would keep its default.
  EXPECT_THAT(settings.Print(), Not(HasSubstr("# default")));
}

TEST(ConfigTest, DefaultsStandWhereNothingIsSaid) {
  Settings settings;
  KVS_ASSERT_OK(
      settings.AddFile("version: 1\nmodel: {path: m}\nserver: {listen: ipc:///s}\npool:\ncold: {dir: ~}\n", "f.yaml"));
  const Result<Config> config = settings.Finish();
  KVS_ASSERT_OK(config);
  EXPECT_EQ(config->reuse, ReuseMode::kExact);
  EXPECT_EQ(config->dtype, "bfloat16");
  EXPECT_EQ(config->device, "cpu");
  EXPECT_EQ(config->pool_bytes, 0);
  EXPECT_EQ(config->cold_dir, "");
  EXPECT_EQ(config->http_host, "");
  EXPECT_FALSE(config->blend_gradual);
  EXPECT_EQ(config->max_running, 64);
  EXPECT_FALSE(config->blend_recompute.has_value());
  EXPECT_EQ(config->exact_agents, (std::vector<std::string>{"judge", "verifier"}));
  EXPECT_EQ(config->anchor_memory, std::int64_t{512} << 20);
}

TEST(ConfigTest, HttpIsThisMachinesAloneUnlessSaid) {
  const auto where = [](const char* text) {
    Settings settings;
    KVS_EXPECT_OK(settings.AddFlag(Key("model.path"), "m"));
    KVS_EXPECT_OK(settings.AddFlag(Key("server.listen"), "ipc:///s"));
    KVS_EXPECT_OK(settings.AddFlag(Key("server.http"), text));
    const Result<Config> config = settings.Finish();
    KVS_EXPECT_OK(config);
    return config->http_host + " " + std::to_string(config->http_port);
  };
  EXPECT_EQ(where("8000"), "127.0.0.1 8000");
  EXPECT_EQ(where("localhost:0"), "localhost 0");
  EXPECT_EQ(where("[::1]:80"), "[::1] 80");
  EXPECT_EQ(where("*:80"), "* 80");
}

TEST(ConfigTest, FlagWinsOverEnvironmentOverFileOverDefault) {
  const std::size_t mode = Key("reuse.mode");
  const auto winner = [&](bool file, bool environment, bool flag) {
    Settings settings;
    KVS_EXPECT_OK(settings.AddFlag(Key("model.path"), "m"));
    KVS_EXPECT_OK(settings.AddFlag(Key("server.listen"), "ipc:///s"));
    // In the wrong order on purpose: the layer decides, not who came last.
    if (flag) {
      KVS_EXPECT_OK(settings.AddFlag(mode, "epic"));
    }
    if (environment) {
      KVS_EXPECT_OK(settings.AddEnvironment({"KVSHARE_REUSE_MODE=rotate", "PATH=x", "KVSHARE_BIN=y"}));
    }
    if (file) {
      KVS_EXPECT_OK(settings.AddFile("version: 1\nreuse: {mode: off}\n", "f.yaml"));
    }
    return settings.Finish()->reuse;
  };
  EXPECT_EQ(winner(false, false, false), ReuseMode::kExact);
  EXPECT_EQ(winner(true, false, false), ReuseMode::kOff);
  EXPECT_EQ(winner(true, true, false), ReuseMode::kRotate);
  EXPECT_EQ(winner(true, true, true), ReuseMode::kEpic);
}

TEST(ConfigTest, PrintedSettingsNameOriginsAndReadBack) {
  Settings settings;
  KVS_ASSERT_OK(settings.AddFile(kWhole, "f.yaml"));
  KVS_ASSERT_OK(settings.AddEnvironment({"KVSHARE_POOL_SIZE=3GiB", "KVSHARE_COLD_DIR="}));
  KVS_ASSERT_OK(settings.AddFlag(Key("model.path"), R"(we"ird \path)"));
  const std::string printed = settings.Print();
  EXPECT_THAT(printed, HasSubstr("size: 3GiB  # KVSHARE_POOL_SIZE\n"));
  EXPECT_THAT(printed, HasSubstr("mode: off  # f.yaml:20\n"));
  EXPECT_THAT(printed, HasSubstr(R"(path: "we\"ird \\path"  # --model)"));
  Settings again;
  KVS_ASSERT_OK(again.AddFile(printed, "printed.yaml"));
  EXPECT_EQ(again.Finish()->model, R"(we"ird \path)");
  EXPECT_EQ(again.Finish()->pool_bytes, std::int64_t{3} << 30);
  EXPECT_EQ(again.Finish()->cold_dir, "/var/cache/kv share");
}

TEST(ConfigTest, UnknownKeysNameLineAndNearest) {
  EXPECT_THAT(Refusal("version: 1\nmodle:\n  path: x\n"), "f.yaml:2: unknown section 'modle'; did you mean 'model'?");
  EXPECT_THAT(Refusal("version: 1\npool:\n\n  sise: 1GiB\n"),
              "f.yaml:4: unknown key 'pool.sise'; did you mean 'size'?");
  EXPECT_THAT(Refusal("version: 1\npool: {listen: x}\n"), HasSubstr("it stands under 'server:'"));
  EXPECT_THAT(Refusal("version: 1\npool: {zzzzzz: x}\n"), HasSubstr("'pool:' knows size, eviction"));
  EXPECT_THAT(Refusal("version: 1\nreuse: {exact_agents: 'judge,,x'}\n"), HasSubstr("has an empty word"));
  EXPECT_THAT(Refusal("version: 1\nserver: ipc\n"), HasSubstr("f.yaml:2: 'server' is a section"));
  EXPECT_THAT(Refusal("version: 1\nmodel:\n  path: x\n  path: y\n"), "f.yaml:4: 'path' is given twice");
  EXPECT_THAT(Refusal("version: 1\nmodel: {}\nmodel: {}\n"), "f.yaml:3: 'model' is given twice");
  EXPECT_THAT(Refusal("model: {path: x}\n"), "f.yaml:1: 'version: 1' is missing");
  EXPECT_THAT(Refusal("version: 2\n"), "f.yaml:1: version must be 1");
  EXPECT_THAT(Refusal("version: '1'\n"), "f.yaml:1: version must be 1");
}

TEST(ConfigTest, WrongValuesNameLineKeyAndWhatIsRight) {
  EXPECT_THAT(Refusal("version: 1\nserver:\n  max_running: 0\n"),
              "f.yaml:3: server.max_running: '0' is not a whole number from 1 to 1024");
  EXPECT_THAT(Refusal("version: 1\nserver:\n  max_running: '8'\n"), HasSubstr("not text in quotes"));
  EXPECT_THAT(Refusal("version: 1\nmodel: {threads: 1.5}\n"), HasSubstr("model.threads"));
  EXPECT_THAT(Refusal("version: 1\nmodel: {threads: -1}\n"), HasSubstr("model.threads"));
  EXPECT_THAT(Refusal("version: 1\npool: {size: 8 gigs}\n"), HasSubstr("pool.size: '8 gigs' is not a size"));
  EXPECT_THAT(Refusal("version: 1\npool: {size: 0}\n"), HasSubstr("pool.size"));
  EXPECT_THAT(Refusal("version: 1\nreuse: {mode: exat}\n"), HasSubstr("did you mean 'exact'?"));
  EXPECT_THAT(Refusal("version: 1\nreuse: {blend_recompute: 1.01}\n"), HasSubstr("from 0 to 1"));
  EXPECT_THAT(Refusal("version: 1\nreuse: {blend_recompute: nan}\n"), HasSubstr("from 0 to 1"));
  EXPECT_THAT(Refusal("version: 1\nreuse: {anchor_memory: much}\n"), HasSubstr("is not a size"));
  EXPECT_THAT(Refusal("version: 1\nserver: {listen: nonsense}\n"), HasSubstr("server.listen"));
  EXPECT_THAT(Refusal("version: 1\nserver: {http: localhost}\n"), HasSubstr("HOST:PORT"));
  EXPECT_THAT(Refusal("version: 1\nmodel: {path: \"a\\nb\"}\n"), HasSubstr("control character"));
  EXPECT_THAT(Refusal("version: 1\nmodel: {path: ''}\n"), HasSubstr("empty"));
}

TEST(ConfigTest, MoreThanTheYamlWeKnowIsRefused) {
  EXPECT_THAT(Refusal(""), HasSubstr("f.yaml:1: the file is empty"));
  EXPECT_THAT(Refusal("- a\n"), HasSubstr("f.yaml:1: a list"));
  EXPECT_THAT(Refusal("version: 1\nmodel: [x]\n"), HasSubstr("f.yaml:2: a list"));
  EXPECT_THAT(Refusal("version: 1\nmodel: {path: {a: b}}\n"), HasSubstr("model.path is a single value"));
  EXPECT_THAT(Refusal("version: 1\nmodel: &m {path: x}\n"), HasSubstr("anchors"));
  EXPECT_THAT(Refusal("version: 1\nmodel: {path: &m x}\n"), HasSubstr("anchors"));
  EXPECT_THAT(Refusal("version: 1\nmodel: *m\n"), HasSubstr("aliases"));
  EXPECT_THAT(Refusal("version: 1\nmodel: {path: !!str x}\n"), HasSubstr("tags"));
  EXPECT_THAT(Refusal("version: 1\n---\nversion: 1\n"), HasSubstr("second document"));
  EXPECT_THAT(Refusal("version: 1\nmodel: {path: x\n"), HasSubstr("not YAML"));
  EXPECT_THAT(Refusal("version: 1\n\tmodel:\n"), HasSubstr("f.yaml:2: not YAML"));
  EXPECT_THAT(Refusal("version: 1\nmodel: {path: \"\xff\xfe\"}\n"), HasSubstr("not YAML"));
  EXPECT_THAT(Refusal("version: 1\n? [a]\n: b\n"), HasSubstr("a list"));
  EXPECT_THAT(Refusal("version: 1\n#" + std::string(1 << 20, 'x')), HasSubstr("larger than 1 MiB"));
  std::string many = "version: 1\nmodel:\n";
  for (int i = 0; i < 2000; ++i) many += "  k" + std::to_string(i) + ": x\n";
  EXPECT_THAT(Refusal(many), HasSubstr("too many"));
}

TEST(ConfigTest, TheEnvironmentIsStrictWithinOurSections) {
  Settings settings;
  KVS_EXPECT_FAILS(settings.AddEnvironment({"KVSHARE_POOL_SISE=1GiB"}), StatusCode::kInvalidArgument,
                   "unknown environment variable 'KVSHARE_POOL_SISE'; did you mean 'KVSHARE_POOL_SIZE'?");
  KVS_EXPECT_FAILS(settings.AddEnvironment({"KVSHARE_POOL_SIZE=much"}), StatusCode::kInvalidArgument,
                   "KVSHARE_POOL_SIZE: 'much' is not a size");
  KVS_EXPECT_OK(settings.AddEnvironment({"KVSHARE_SMOLLM2=x", "KVSHARE_SHARED=y", "KVSHARE_=z", "KVSHARE_POOL_SIZE"}));
}

TEST(ConfigTest, ContradictionsNameTheFix) {
  Settings settings;
  KVS_EXPECT_FAILS(settings.Finish(), StatusCode::kInvalidArgument, "--model is required");
  KVS_ASSERT_OK(settings.AddFlag(Key("model.path"), "m"));
  KVS_EXPECT_FAILS(settings.Finish(), StatusCode::kInvalidArgument, "--listen is required");
  KVS_ASSERT_OK(settings.AddFlag(Key("server.listen"), "ipc:///s"));
  KVS_EXPECT_OK(settings.Finish());
  KVS_ASSERT_OK(settings.AddFile("version: 1\ncold:\n  size: 1GiB\n", "f.yaml"));
  KVS_EXPECT_FAILS(settings.Finish(), StatusCode::kInvalidArgument, "f.yaml:3: a cold tier's size without");
  KVS_ASSERT_OK(settings.AddFlag(Key("cold.dir"), "d"));
  KVS_EXPECT_OK(settings.Finish());
  KVS_ASSERT_OK(settings.AddFlag(Key("model.device"), "cuda"));
  KVS_EXPECT_OK(settings.Finish());
  KVS_ASSERT_OK(settings.AddEnvironment({"KVSHARE_MODEL_DTYPE=float32"}));
  KVS_EXPECT_FAILS(settings.Finish(), StatusCode::kInvalidArgument,
                   "--device: a GPU computes in bfloat16 or float16, and KVSHARE_MODEL_DTYPE says float32");
  KVS_ASSERT_OK(settings.AddEnvironment({"KVSHARE_MODEL_DTYPE=float16"}));
  const Result<Config> half = settings.Finish();
  KVS_ASSERT_OK(half);
  EXPECT_EQ(half->dtype, "float16");
  for (const char* device : {"cpu", "auto"}) {
    KVS_ASSERT_OK(settings.AddFlag(Key("model.device"), device));
    KVS_EXPECT_FAILS(settings.Finish(), StatusCode::kInvalidArgument,
                     "KVSHARE_MODEL_DTYPE: only a GPU computes in float16; add --device cuda");
  }
}

TEST(ConfigTest, TheTableIsConsistent) {
  std::set<std::string> keys, flags, variables;
  for (const Option& option : Options()) {
    EXPECT_TRUE(keys.insert(option.key).second) << option.key;
    EXPECT_TRUE(flags.insert(option.flag).second) << option.flag;
    EXPECT_TRUE(variables.insert(EnvironmentName(option)).second) << option.key;
    if (*option.fallback != '\0') {
      KVS_EXPECT_OK(CheckValue(option, option.fallback));
    }
  }
  const Option& eviction = Options()[Key("pool.eviction")];
  for (const std::string_view name : EvictionPolicyNames()) KVS_EXPECT_OK(CheckValue(eviction, name));
  for (int mode = 0; mode <= static_cast<int>(ReuseMode::kAuto); ++mode) {
    KVS_EXPECT_OK(CheckValue(Options()[Key("reuse.mode")], ReuseModeName(static_cast<ReuseMode>(mode))));
  }
}

TEST(ConfigTest, TheReferenceListsEveryKey) {
  std::ifstream file(std::string(KVS_SOURCE_DIR) + "/docs/reference/config.md");
  std::stringstream text;
  text << file.rdbuf();
  for (const Option& option : Options()) {
    const std::string fallback = *option.fallback == '\0' ? "" : "`" + std::string(option.fallback) + "`";
    const std::string row = "| `" + std::string(option.key) + "` | `" + option.flag + "` | `" +
                            EnvironmentName(option) + "` | " + fallback + " |";
    EXPECT_THAT(text.str(), HasSubstr(row));
  }
}

TEST(ConfigTest, FilesThatCannotBeReadAreNamed) {
  KVS_EXPECT_FAILS(ReadConfigFile("no/such.yaml"), StatusCode::kInvalidArgument, "no/such.yaml: No such file");
  KVS_EXPECT_FAILS(ReadConfigFile("/"), StatusCode::kInvalidArgument, "/: ");
}

}  // namespace
}  // namespace kvshare::agentd
