// kvctl: the command line. This file alone knows CLI11; every command is a plain function of its options (commands.h).
#include <CLI/CLI.hpp>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>

#include "kvshare/client.h"
#include "libkvshare/core/suggest.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/exit_code.h"
#include "tools/kvctl/values.h"

namespace kvshare::kvctl {
namespace {

constexpr int kMaxCount = 1 << 20;
constexpr const char* kTraceFile = "KTR-1, Mooncake or OpenAI-chat JSON lines, plain or .gz";

// An option whose text a parser of ours turns into a value; CLI11 puts the flag's name before the parser's error.
template <typename T>
CLI::Option* AddParsed(CLI::App* app, const char* name, T* out,
                       const std::function<Result<T>(const std::string&)>& parse, const char* help, const char* kind) {
  const std::string flag = name;
  return app
      ->add_option_function<std::string>(
          name,
          [out, parse, flag](const std::string& text) {
            auto value = parse(text);
            if (!value.ok()) throw CLI::ValidationError(flag, value.status().message());
            *out = std::move(*value);
          },
          help)
      ->type_name(kind);
}

void AddModel(CLI::App* app, Source* source, bool required = true,
              Result<kernels::DType> (*parse_dtype)(std::string_view) = ParseCpuDType) {
  auto* option =
      app->add_option("--model", source->model, "Hugging Face directory or one .gguf file")->type_name("MODEL");
  if (required) option->required();
  app->add_option("--lora", source->lora, "a PEFT LoRA adapter's directory, merged in at load")->type_name("DIR");
  AddParsed<kernels::DType>(app, "--dtype", &source->dtype, parse_dtype, "float32 or bfloat16 (default)", "TYPE");
  app->add_option("--threads", source->threads, "compute threads; default: one per core")
      ->type_name("N")
      ->check(CLI::Range(1, 1024));
}

void AddTimeout(CLI::App* app, Source* source) {
  AddParsed<std::chrono::milliseconds>(app, "--timeout", &source->timeout, ParseDuration,
                                       "give up after this long (30s)", "TIME");
}

void AddEndpoint(CLI::App* app, Source* source, bool required) {
  auto* option = app->add_option_function<std::string>(
      "--endpoint",
      [source](const std::string& text) {
        const Status status = ValidateEndpoint(text);
        if (!status.ok()) throw CLI::ValidationError("--endpoint", status.message());
        source->endpoint = text;
      },
      "a running agentd: ipc://PATH or tcp://HOST:PORT");
  option->type_name("ENDPOINT");
  if (required) option->required();
  AddTimeout(app, source);
}

// CLI::Range takes nan, and CLI11's other messages do not say what would be right.
CLI::Validator Refusing(std::string (*why)(const std::string& text)) {
  return CLI::Validator([why](std::string& text) { return why(text); }, "");
}

std::string NotANumber(const std::string& text, double least, double most, const char* wanted) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool right = error == std::errc() && end == text.data() + text.size() && value >= least && value <= most;
  return right ? "" : "'" + text + "' is not a number " + wanted;
}

// CLI11 takes -1 and what 64 bits do not hold for other seeds.
std::string NotASeed(const std::string& text) {
  std::uint64_t seed = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seed);
  const bool right = error == std::errc() && end == text.data() + text.size();
  return right ? "" : "'" + text + "' is not a whole number from 0 to 18446744073709551615";
}

// A daemon or a model, one of the two.
void AddEither(CLI::App* app, Source* source) {
  auto* group = app->add_option_group("target");
  AddModel(group, source, false);
  AddEndpoint(group, source, false);
  app->parse_complete_callback([source] {
    if (source->model.empty() == source->endpoint.empty())
      throw CLI::ValidationError("exactly one of --model and --endpoint is needed");
  });
}

void AddFormat(CLI::App* app, OutputFormat* format) {
  AddParsed<OutputFormat>(
      app, "--format", format,
      [](const std::string& text) -> Result<OutputFormat> {
        if (text == "text") return OutputFormat::kText;
        if (text == "json") return OutputFormat::kJson;
        return InvalidArgument("'" + text + "' is neither text nor json");
      },
      "text (default) or json", "FORMAT");
}

void AddReuse(CLI::App* app, std::optional<ReuseMode>* reuse) {
  AddParsed<std::optional<ReuseMode>>(
      app, "--reuse", reuse,
      [](const std::string& text) -> Result<std::optional<ReuseMode>> {
        const auto mode = ParseReuseMode(text);
        if (!mode.ok()) return mode.status();
        return std::optional<ReuseMode>(*mode);
      },
      "off, exact, rotate, epic, cacheblend, dhd, kvcomm or auto; default: the daemon's own", "MODE");
}

Result<std::optional<double>> ParseBlendRecompute(const std::string& text) {
  const auto share = ParseFraction(text);
  if (!share.ok()) return share.status();
  return std::optional<double>(*share);
}

void AddBlendFilter(CLI::App* app, std::string* filter, const char* help) {
  app->add_option("--blend-filter", *filter, help)->type_name("HOW")->check(CLI::IsMember({"once", "gradual"}));
}

void AddCounts(CLI::App* app, const char* name, std::vector<std::int64_t>* out, std::int64_t max, const char* help) {
  AddParsed<std::vector<std::int64_t>>(
      app, name, out, [max](const std::string& text) { return ParseCounts(text, max); }, help, "N,N,...");
}

// Owns every command's options; one of the Run functions is called after parsing.
class CommandLine {
 public:
  CommandLine() : app_("kvctl: the command of kvshare, KV-cache sharing for multi-agent LLM systems", "kvctl") {
    app_.require_subcommand(1);
    app_.set_version_flag("--version", "kvctl " KVS_VERSION);
    AddText();
    AddGenerate();
    AddDaemon();
    AddStoredKv();
    AddModels();
    AddTrace();
  }

  int Run(int argc, char** argv) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::Success& success) {  // --help, --version
      return app_.exit(success);
    } catch (const CLI::Error& error) {
      return Usage(error);
    }
    return run_();
  }

 private:
  template <typename Options>
  CLI::App* Add(CLI::App* parent, const char* name, const char* help, int (*run)(const Options&), Options* options) {
    CLI::App* command = parent->add_subcommand(name, help);
    command->callback([this, run, options] { run_ = [run, options] { return run(*options); }; });
    return command;
  }

  void AddText() {
    auto* logits = Add(&app_, "logits", "logits of every token of a prompt, as .npy", RunLogits, &logits_);
    AddModel(logits, &logits_.source, true, ParseDType);
    AddParsed<runtime::Device>(logits, "--device", &logits_.source.device, runtime::ParseDevice,
                               "cpu (default), cuda, or auto: a GPU where one can be used", "DEVICE");
    logits->parse_complete_callback([source = &logits_.source] {
      if (source->device == runtime::Device::kCuda && source->dtype == kernels::DType::kF32) {
        throw CLI::ValidationError("--dtype", "a GPU computes in bfloat16 or float16, not in float32");
      }
      if (source->device == runtime::Device::kCpu && source->dtype == kernels::DType::kF16) {
        throw CLI::ValidationError("--dtype", "only a GPU computes in float16; add --device cuda");
      }
    });
    logits->add_option("--ids", logits_.ids_file, "{\"ids\":[...]}")->required()->type_name("FILE");
    logits->add_option("--out", logits_.out_file, "float32 [tokens, vocabulary]")->required()->type_name("FILE.npy");
    AddCounts(logits, "--chunks", &logits_.chunks, kMaxCount,
              "compute the prompt in pieces of these sizes; the last repeats");

    auto* tokenize = Add(&app_, "tokenize", "text to token ids, JSON lines", RunTokenize, &text_);
    AddEither(tokenize, &text_.source);
    tokenize->add_option("--jsonl", text_.jsonl_file, "{\"text\":...} per line; - is stdin")
        ->required()
        ->type_name("FILE");
    auto* detokenize = Add(&app_, "detokenize", "token ids to text, JSON lines", RunDetokenize, &text_);
    AddEither(detokenize, &text_.source);
    detokenize->add_option("--jsonl", text_.jsonl_file, "{\"ids\":[...]} per line; - is stdin")
        ->required()
        ->type_name("FILE");
    auto* render = Add(&app_, "render", "chat messages to the model's prompt", RunRender, &text_);
    AddEither(render, &text_.source);
    render->add_option("--messages", text_.messages_file, "OpenAI chat messages")->required()->type_name("FILE");
    render->add_option("--tools", text_.tools_file, "OpenAI tools")->type_name("FILE");
    render->add_flag_callback(
        "--no-generation-prompt", [this] { text_.add_generation_prompt = false; }, "end after the last message");
  }

  void AddGenerate() {
    auto* command = Add(&app_, "generate", "one reply", RunGenerate, &generate_);
    AddEither(command, &generate_.source);
    generate_.source.timeout = std::chrono::minutes(5);
    auto* prompt = command->add_option_group("prompt");
    prompt->add_option("--prompt", generate_.prompt, "text as it is")->type_name("TEXT");
    prompt->add_option("--messages", generate_.messages_file, "OpenAI chat messages")->type_name("FILE");
    prompt->add_option("--ids", generate_.ids_file, "{\"ids\":[...]}")->type_name("FILE");
    prompt->require_option(1);
    command->add_option("--tools", generate_.tools_file, "OpenAI tools, with --messages")->type_name("FILE");
    command->add_option("--max-tokens", generate_.max_tokens, "tokens at most (128)")
        ->type_name("N")
        ->check(CLI::Range(1, kMaxCount));
    SamplingParams* sampling = &generate_.sampling;
    command->add_option("--temperature", sampling->temperature, "0 (default): greedy")
        ->type_name("T")
        ->check(Refusing([](const std::string& text) { return NotANumber(text, 0, 100, "from 0 to 100"); }));
    command->add_option("--top-k", sampling->top_k, "0: no limit")->type_name("K")->check(CLI::Range(0, kMaxCount));
    command->add_option("--top-p", sampling->top_p, "1: no limit")
        ->type_name("P")
        ->check(Refusing([](const std::string& text) {
          return NotANumber(text, std::numeric_limits<float>::min(), 1, "above 0 and at most 1");
        }));
    command->add_option("--seed", sampling->seed, "same seed, same reply; default: 0")
        ->type_name("S")
        ->check(Refusing(&NotASeed));
    command->add_option("--stop", generate_.stop, "end before this text; may be repeated")
        ->type_name("TEXT")
        ->check(Refusing([](const std::string& text) { return std::string(text.empty() ? "it is empty" : ""); }))
        ->allow_extra_args(false);
    command->add_flag("--ignore-eos", generate_.ignore_eos, "go on to --max-tokens whatever the model says");
    command->add_option("--agent", generate_.agent, "who asks")->type_name("NAME");
    command->add_option("--session", generate_.session, "which conversation")->type_name("NAME");
    AddReuse(command, &generate_.reuse);
    AddParsed<std::optional<double>>(command, "--blend-recompute", &generate_.blend_recompute, ParseBlendRecompute,
                                     "with --model: share of a moved chunk that is computed anew (0..1)", "R");
    AddBlendFilter(command, &generate_.blend_filter,
                   "with --model: mode cacheblend chooses at one layer (once, the default) or from layer to layer");
    AddFormat(command, &generate_.format);
  }

  void AddDaemon() {
    auto* ping = Add(&app_, "ping", "wait until a daemon is ready", RunPing, &daemon_);
    AddEndpoint(ping, &daemon_.source, true);
    AddFormat(ping, &daemon_.format);
    auto* info = Add(&app_, "info", "everything about a daemon, by sections", RunInfo, &daemon_);
    AddEndpoint(info, &daemon_.source, true);
    info->add_option("SECTION", daemon_.topic, "server, model, pool, cold, reuse or agents; default: all")
        ->check(CLI::IsMember({"server", "model", "pool", "cold", "reuse", "agents"}));
    AddFormat(info, &daemon_.format);
    auto* stat = Add(&app_, "stat", "a daemon's totals since its start, or one line per interval", RunStat, &daemon_);
    AddEndpoint(stat, &daemon_.source, true);
    AddInterval(stat, &daemon_);
    AddFormat(stat, &daemon_.format);
    auto* top = Add(&app_, "top", "who asks for what at this moment, agent by agent", RunTop, &top_);
    AddEndpoint(top, &top_.source, true);
    top_.interval_s = 1;
    AddInterval(top, &top_);
    AddFormat(top, &top_.format);
    auto* drain = Add(&app_, "drain", "let a daemon finish what it has begun, and end", RunDrain, &daemon_);
    AddEndpoint(drain, &daemon_.source, true);
    AddFormat(drain, &daemon_.format);
    auto* explain =
        Add(&app_, "explain", "what would be, or was, reused for a prompt, and why not the rest", RunExplain, &daemon_);
    AddEither(explain, &daemon_.source);
    auto* what = explain->add_option_group("what");
    what->add_option("--messages", daemon_.messages_file, "OpenAI chat messages")->type_name("FILE");
    what->add_option("--request", daemon_.request_id, "an earlier request's id")
        ->type_name("ID")
        ->check(Refusing([](const std::string& text) {
          const bool digits = !text.empty() && text.find_first_not_of("0123456789") == text.npos && text != "0";
          return digits ? std::string() : "'" + text + "' is no request's id, a number from 1 on";
        }));
    what->require_option(1);
    explain->add_option("--agent", daemon_.agent, "who asks")->type_name("NAME");
    explain->add_option("--session", daemon_.session, "which conversation")->type_name("NAME");
    AddReuse(explain, &daemon_.reuse);
    AddFormat(explain, &daemon_.format);
  }

  static void AddInterval(CLI::App* command, DaemonOptions* options) {
    command->add_option("-i,--interval", options->interval_s, "again every so many seconds")
        ->type_name("SECONDS")
        ->check(Refusing(
            [](const std::string& text) { return NotANumber(text, 0.05, 86400, "of seconds from 0.05 to 86400"); }));
    command->add_option("-n,--count", options->count, "so many times; default: until Ctrl-C")
        ->type_name("N")
        ->check(CLI::Range(1, kMaxCount));
  }

  // One of the commands on a daemon's stored KV.
  CLI::App* AddEntries(const char* name, const char* help, int (*run)(const EntriesOptions&)) {
    CLI::App* command = Add(&app_, name, help, run, &entries_);
    AddEndpoint(command, &entries_.source, true);
    AddFormat(command, &entries_.format);
    return command;
  }

  void AddKey(CLI::App* command) {
    command->add_option("KEY", entries_.key, "as `kvctl ls` shows it, or a beginning of it that is the only one")
        ->required()
        ->check(Refusing([](const std::string& text) {
          return text.empty() ? std::string("KEY is empty; see `kvctl ls`") : std::string();
        }));
  }

  void AddTier(CLI::App* command) {
    command->add_option("--tier", entries_.tier, "host or cold; default: both")
        ->type_name("TIER")
        ->check(CLI::IsMember({"host", "cold"}));
  }

  void AddStoredPrompt(CLI::App* command) {
    auto* prompt = command->add_option_group("prompt");
    prompt->add_option("--prompt", entries_.prompt, "text as it is")->type_name("TEXT");
    prompt->add_option("--messages", entries_.messages_file, "OpenAI chat messages")->type_name("FILE");
    prompt->add_option("--ids", entries_.ids_file, "{\"ids\":[...]}")->type_name("FILE");
    prompt->require_option(1);
  }

  void AddStoredKv() {
    auto* ls = AddEntries("ls", "stored pages, the most recently used first", RunLs);
    ls->add_option("--limit", entries_.limit, "pages at most (100)")->type_name("N")->check(CLI::Range(1, 10000));
    AddKey(AddEntries("inspect", "one stored page: its tokens, its text, who uses it", RunInspect));
    auto* evict = AddEntries("evict", "forget a page and all that continues it", RunEvict);
    AddKey(evict);
    AddTier(evict);
    auto* clear = AddEntries("clear", "forget all stored KV that nobody uses", RunClear);
    AddTier(clear);
    clear->add_flag("--yes", entries_.yes, "it is meant");
    auto* pin = AddEntries("pin", "keep a prompt's stored KV in memory", RunPin);
    AddStoredPrompt(pin);
    AddParsed<std::chrono::milliseconds>(pin, "--ttl", &entries_.ttl, ParseDuration,
                                         "for this long; default: until unpin", "TIME");
    AddKey(AddEntries("unpin", "undo a pin", RunUnpin));
    auto* prefetch = AddEntries("prefetch", "load a prompt's stored KV from the cold tier into memory", RunPrefetch);
    AddStoredPrompt(prefetch);
    prefetch->add_option("--agent", entries_.agent, "who will ask")->type_name("NAME");
    prefetch->add_option("--session", entries_.session, "in which conversation")->type_name("NAME");
  }

  void AddModels() {
    auto* model = Add(&app_, "model", "what a model's files hold", RunModel, &model_);
    AddModel(model, &model_.source);
    AddFormat(model, &model_.format);
    auto* doctor = Add(&app_, "doctor", "what this machine offers, what is missing, what to do", RunDoctor, &model_);
    AddModel(doctor, &model_.source, false);
    doctor->add_option("--cold-dir", model_.cold_dir, "judge the disk there for a cold tier")->type_name("DIR");
    AddFormat(doctor, &model_.format);
    auto* bench = app_.add_subcommand("bench", "measure");
    bench->require_subcommand(1);
    auto* speed = Add(bench, "model", "prefill and decode speed beside the machine's ceilings", RunBenchModel, &bench_);
    speed->add_option("--model", bench_.source.model, "Hugging Face directory or one .gguf file")
        ->type_name("MODEL")
        ->required();
    speed->add_option("--lora", bench_.source.lora, "a PEFT LoRA adapter's directory")->type_name("DIR");
    AddParsed<kernels::DType>(speed, "--dtype", &bench_.source.dtype, ParseCpuDType, "float32 or bfloat16 (default)",
                              "TYPE");
    speed->add_flag("--random-weights", bench_.random_weights, "make weights up: MODEL needs its config.json only");
    AddCounts(speed, "--prompt", &bench_.prompt_tokens, kMaxCount, "prompt lengths (512)");
    AddCounts(speed, "--gen", &bench_.gen_tokens, kMaxCount, "generated tokens (64)");
    AddCounts(speed, "--threads", &bench_.threads, 1024, "thread counts; default: one per core");
    speed->add_option("--repeat", bench_.repeat, "repetitions after the warm-up (3)")
        ->type_name("N")
        ->check(CLI::Range(1, 10000));
    AddFormat(speed, &bench_.format);
    AddQuality(bench);
  }

  void AddQuality(CLI::App* bench) {
    auto* quality = Add(bench, "quality", "what each reuse policy does to answers, beside exact prefill",
                        RunBenchQuality, &quality_);
    quality->add_option("--model", quality_.model, "Hugging Face directory or one .gguf file")
        ->type_name("MODEL")
        ->required();
    quality->add_option("--lora", quality_.lora, "PEFT LoRA adapter, merged at load")->type_name("DIR");
    AddParsed<kernels::DType>(quality, "--dtype", &quality_.dtype, ParseCpuDType, "float32 or bfloat16 (default)",
                              "TYPE");
    quality->add_option("--threads", quality_.threads, "compute threads; default: one per core")
        ->type_name("N")
        ->check(CLI::Range(1, 1024));
    auto* source = quality->add_option_group("source");
    source->add_option("--world", quality_.world, "notes and questions made up from this seed")
        ->type_name("SEED")
        ->check(Refusing(&NotASeed));
    source->add_option("--cases", quality_.cases_file, "chat cases, JSON lines; - is stdin")->type_name("FILE");
    source->require_option(1);
    AddParsed<std::vector<ReuseMode>>(quality, "--policies", &quality_.policies, ParseModes, "reuse modes", "MODE,...")
        ->required();
    quality->add_option("--budget", quality_.budget, "share of reusable KV that a policy may compute; default: its own")
        ->type_name("R")
        ->check(Refusing([](const std::string& text) { return NotANumber(text, 0, 1, "from 0 to 1"); }));
    AddBlendFilter(quality, &quality_.blend_filter,
                   "cacheblend chooses at one layer (once, the default) or from layer to layer");
    quality
        ->add_option(
            "--stored-in", quality_.stored_in,
            "where stored chunks were computed: alone, in a thread, reversed, behind another first message, or with "
            "another short message amid; default: alone, auto's in thread")
        ->type_name("WHERE")
        ->check(CLI::IsMember({"alone", "thread", "reversed", "behind", "amid"}));
    quality->add_option("--samples", quality_.samples, "conversations of the world (75), or cases of the file (all)")
        ->type_name("N")
        ->check(CLI::Range(1, 100000));
    quality->add_flag_callback(
        "--no-noise-floor", [this] { quality_.noise_floor = false; }, "do not load the model in the other dtype too");
    quality->add_option("--html", quality_.html_file, "write one self-contained page")->type_name("FILE.html");
    quality->add_option("--dump", quality_.dump_file, "write one JSON line per question and policy")->type_name("FILE");
    AddFormat(quality, &quality_.format);
  }

  void AddTrace() {
    auto* trace = app_.add_subcommand("trace", "recorded workloads");
    trace->require_subcommand(1);
    auto* info = Add(trace, "info", "what a trace holds", RunTraceInfo, &trace_);
    info->add_option("FILE", trace_.file, kTraceFile)->required();
    AddFormat(info, &trace_.format);
    auto* replay = Add(trace, "replay", "a trace against a model, once per reuse mode", RunTraceReplay, &trace_);
    replay->add_option("FILE", trace_.file, kTraceFile)->required();
    AddEither(replay, &trace_.source);
    trace_.compare = {ReuseMode::kOff, ReuseMode::kExact};
    AddParsed<std::vector<ReuseMode>>(replay, "--compare", &trace_.compare, ParseModes, "reuse modes (off,exact)",
                                      "MODE,...");
    replay->add_option("--limit", trace_.limit, "the first N requests only")
        ->type_name("N")
        ->check(CLI::Range(std::int64_t{1}, std::int64_t{1'000'000'000}));
    replay->add_option("--max-output", trace_.max_output, "tokens decoded per request at most; default: as recorded")
        ->type_name("N")
        ->check(CLI::Range(1, kMaxCount));
    replay->add_option("--speedup", trace_.speedup, "divide recorded times by this")
        ->type_name("X")
        ->check(Refusing([](const std::string& text) {
          return NotANumber(text, std::numeric_limits<double>::min(), std::numeric_limits<double>::max(), "above 0");
        }));
    replay->add_flag("--as-fast-as-possible", trace_.as_fast_as_possible,
                     "ignore recorded times; keep order and hand-offs");
    replay->add_flag("--open-loop", trace_.open_loop,
                     "send at recorded times, whether or not the requests before are done");
    AddParsed<std::optional<std::chrono::milliseconds>>(
        replay, "--max-delay", &trace_.max_delay,
        [](const std::string& text) -> Result<std::optional<std::chrono::milliseconds>> {
          const auto delay = ParseDuration(text);
          if (!delay.ok()) return delay.status();
          return std::optional<std::chrono::milliseconds>(*delay);
        },
        "no recorded pause counts as longer", "TIME");
    replay->add_option("--slots", trace_.slots, "requests (with a session clock: sessions) at once")
        ->type_name("N")
        ->check(CLI::Range(1, 1024));
    AddParsed<std::int64_t>(
        replay, "--kv-pool-size", &trace_.kv_pool_bytes,
        [](const std::string& text) -> Result<std::int64_t> {
          const Result<std::int64_t> bytes = ParseSize(text);
          if (bytes.ok() && *bytes == 0) return InvalidArgument("'" + text + "' is not a size above 0");
          return bytes;
        },
        "of the in-process engine, as 8GiB", "SIZE");
    replay->add_option("--out", trace_.out_dir, "write report.json, report.html and requests.csv there")
        ->type_name("DIR");
    replay->add_option("--dump", trace_.dump_file, "write one JSON line per request and mode")->type_name("FILE");
    AddFormat(replay, &trace_.format);

    auto* simulate = Add(trace, "simulate", "what pools of other sizes and policies would have hit; needs no model",
                         RunTraceSimulate, &simulate_);
    simulate->add_option("FILE", simulate_.file, "block hashes: Mooncake JSONL or KTR-1, plain or .gz")->required();
    AddParsed<std::vector<double>>(simulate, "--pool-fraction", &simulate_.pool_fractions, ParseFractions,
                                   "pool sizes as parts of the trace's unique blocks (0.05,0.2)", "X,...");
    AddParsed<std::vector<std::string>>(simulate, "--policy", &simulate_.policies, ParseNames,
                                        "lru, s3fifo, cost, default, belady (lru,default,belady)", "POLICY,...");
    AddFormat(simulate, &simulate_.format);

    auto* convert = Add(trace, "convert", "a trace in another format", RunTraceConvert, &trace_convert_);
    convert->add_option("IN", trace_convert_.in_file, kTraceFile)->required();
    convert->add_option("OUT", trace_convert_.out_file, "written as gzip where it ends in .gz")->required();
    convert
        ->add_option_function<std::string>(
            "--to", [this](const std::string& text) { trace_convert_.to_mooncake = text == "mooncake"; },
            "ktr or mooncake")
        ->type_name("FORMAT")
        ->required()
        ->check(CLI::IsMember({"ktr", "mooncake"}));
    convert->add_option("--block", trace_convert_.block_tokens, "tokens of a Mooncake block (512)")
        ->type_name("N")
        ->check(CLI::Range(1, 1 << 16));
    AddModel(convert, &trace_convert_.source, false);
    AddEndpoint(convert, &trace_convert_.source, false);

    auto* record = Add(trace, "record", "send requests to a daemon and write them down as a trace", RunTraceRecord,
                       &trace_record_);
    record->add_option("FILE", trace_record_.in_file, "OpenAI-chat or prompt JSON lines; - (default) is stdin");
    record->add_option("--out", trace_record_.out_file, "the trace, KTR-1; gzip where it ends in .gz")
        ->required()
        ->type_name("FILE");
    AddEither(record, &trace_record_.source);
    trace_record_.source.timeout = std::chrono::minutes(5);
    record->add_option("--max-tokens", trace_record_.max_tokens, "where a request says nothing (128)")
        ->type_name("N")
        ->check(CLI::Range(1, kMaxCount));
    AddReuse(record, &trace_record_.reuse);

    auto* report = Add(trace, "report", "a replay's report.json as text, HTML or CSV", RunTraceReport, &trace_report_);
    report->add_option("FILE", trace_report_.file, "report.json of a replay")->required();
    report->add_option("--out", trace_report_.html_file, "write one self-contained page")->type_name("FILE.html");
    report->add_option("--csv", trace_report_.csv_file, "write one row per mode")->type_name("FILE.csv");
    AddFormat(report, &trace_report_.format);
  }

  // The command that the arguments got to, e.g. `trace replay`.
  CLI::App* Reached() {
    CLI::App* app = &app_;
    while (!app->get_subcommands().empty()) app = app->get_subcommands().front();
    return app;
  }

  static void Names(const CLI::App* app, std::vector<std::string>* names) {
    for (const CLI::Option* option : app->get_options()) {
      for (const std::string& name : option->get_lnames()) names->push_back("--" + name);
    }
    for (const CLI::App* sub : app->get_subcommands([](const CLI::App*) { return true; })) {
      if (sub->get_name().empty() || sub->get_group() == "") continue;
      names->push_back(sub->get_name());
    }
  }

  int Usage(const CLI::Error& error) {
    CLI::App* app = Reached();
    std::vector<std::string> names;
    Names(app, &names);
    // Options of option groups belong to nameless subcommands.
    for (CLI::App* group : app->get_subcommands(
             [](const CLI::App* sub) { return sub->get_name().empty() || sub->get_display_name()[0] == '['; })) {
      Names(group, &names);
    }
    const std::string help = "; see '" + Path(app) + " --help'";
    // An unknown word is the likely cause of whatever else went wrong.
    for (const std::string& word : app_.remaining(true)) {
      if (word == "--") continue;
      const bool flag = word.starts_with("-");
      const std::string name = word.substr(0, word.find('='));
      const std::string near = Nearest(name, names);
      return Fail(kUsage, std::string("unknown ") + (flag ? "flag '" : "argument '") + name + "'" +
                              (near.empty() ? "" : ": did you mean '" + near + "'?") + help);
    }
    return Fail(kUsage, std::string(error.what()) + help);
  }

  static std::string Path(const CLI::App* app) {
    return app->get_parent() == nullptr ? "kvctl" : Path(app->get_parent()) + " " + app->get_name();
  }

  CLI::App app_;
  std::function<int()> run_;
  LogitsOptions logits_;
  TextOptions text_;
  GenerateOptions generate_;
  DaemonOptions daemon_;
  DaemonOptions top_;
  EntriesOptions entries_;
  ModelOptions model_;
  BenchOptions bench_;
  QualityOptions quality_;
  TraceOptions trace_;
  SimulateOptions simulate_;
  TraceConvertOptions trace_convert_;
  TraceRecordOptions trace_record_;
  TraceReportOptions trace_report_;
};

}  // namespace
}  // namespace kvshare::kvctl

int main(int argc, char** argv) {
  kvshare::kvctl::HandleInterrupts();
  kvshare::kvctl::CommandLine command_line;
  const int code = command_line.Run(argc, argv);
  // A full disk or a closed pipe shows only here.
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    return code != 0 ? code : kvshare::kvctl::Fail(kvshare::kvctl::kFailed, "stdout could not be written");
  }
  return code;
}
