// agentd: one model, one pool of KV, one socket. The command line and its layers of settings; RunDaemon does the rest.
#include <malloc.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "agentd/config/config.h"
#include "agentd/config/options.h"
#include "agentd/program/daemon.h"
#include "agentd/program/exit_code.h"
#include "agentd/program/signal_watch.h"
#include "kvshare/status.h"
#include "libkvshare/core/status_macros.h"
#include "libkvshare/core/suggest.h"

namespace kvshare::agentd {
namespace {

// What the command line holds beside the settings that agentd/config knows.
struct CommandLine {
  std::string config_file;
  bool check_config = false;
  bool print_config = false;
  std::vector<std::pair<std::size_t, std::string>> flags;  // option and text, in order
};

void DefineFlags(CLI::App& app, CommandLine& line) {
  app.set_version_flag("--version", std::string("agentd ") + KVSHARE_VERSION);
  app.add_option("--config", line.config_file, "A YAML file of settings; environment and flags win over it")
      ->type_name("FILE");
  app.add_flag("--check-config", line.check_config, "Check the settings and end: exit code 0 or 2");
  app.add_flag("--print-config", line.print_config, "Print the settings and where each comes from, and end");
  const std::span<const Option> options = Options();
  for (std::size_t i = 0; i < options.size(); ++i) {
    const Option& option = options[i];
    const std::string fallback = *option.fallback == '\0' ? "" : std::string(" [") + option.fallback + "]";
    app.add_option_function<std::string>(
           option.flag, [&line, i](const std::string& text) { line.flags.emplace_back(i, text); },
           option.help + fallback)
        ->type_name(ValuesOf(option));
  }
}

std::string Usage(const CLI::App& app, const CLI::ParseError& error) {
  // An unknown word is the likely cause of whatever else went wrong.
  for (const std::string& word : app.remaining()) {
    if (word == "--") continue;
    std::vector<std::string> known;
    for (const CLI::Option* option : app.get_options()) {
      for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
    }
    const std::string name = word.substr(0, word.find('='));
    const std::string near = Nearest(name, known);
    return "unknown argument '" + name + "'" + (near.empty() ? "" : "; did you mean '" + near + "'?") +
           "; see agentd --help";
  }
  return std::string(error.what()) + "; see agentd --help";
}

// All layers, the lowest first.
Status Collect(const CommandLine& line, Settings& settings) {
  std::string file = line.config_file;
  if (const char* named = std::getenv("KVSHARE_CONFIG"); file.empty() && named != nullptr) file = named;
  if (!file.empty()) {
    const Result<std::string> text = ReadConfigFile(file);
    if (!text.ok()) return text.status();
    KVS_RETURN_IF_ERROR(settings.AddFile(*text, file));
  }
  std::vector<std::string> environment;
  for (char** variable = environ; variable != nullptr && *variable != nullptr; ++variable) {
    environment.emplace_back(*variable);
  }
  KVS_RETURN_IF_ERROR(settings.AddEnvironment(environment));
  for (const auto& [option, text] : line.flags) KVS_RETURN_IF_ERROR(settings.AddFlag(option, text));
  return OkStatus();
}

int Main(int argc, char** argv) {
  // Buffers of a step come and go; given back to the system each time, they would be faulted in again each time.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 256 << 20);

  CLI::App app("agentd serves one model and shares its KV between agents.");
  CommandLine line;
  try {
    DefineFlags(app, line);
    app.allow_extras();  // so that Usage can name an unknown flag's nearest
    app.parse(argc, argv);
    if (!app.remaining().empty()) return Fail(kExitUsage, Usage(app, CLI::ExtrasError(app.remaining())));
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    return Fail(kExitUsage, Usage(app, error));
  }
  Settings settings;
  const Status collected = Collect(line, settings);
  if (!collected.ok()) return Fail(kExitUsage, collected.message());
  if (line.print_config) std::fputs(settings.Print().c_str(), stdout);
  const Result<Config> config = settings.Finish();
  if (line.print_config) return kExitOk;
  if (!config.ok()) return Fail(kExitUsage, config.status().message());
  if (line.check_config) return kExitOk;
  // Outlives the frame it is made in: its thread is never joined.
  static SignalWatch signals;
  return RunDaemon(*config, signals);
}

}  // namespace
}  // namespace kvshare::agentd

int main(int argc, char** argv) { return kvshare::agentd::Main(argc, argv); }
