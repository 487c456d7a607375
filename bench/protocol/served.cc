// What the daemon adds to the engine, and what an exact hit leaves of a prefill, on one model.
//
//   served MODEL [ROUNDS]               default: 15 rounds
//
// One service, asked over ipc and in this process, in turns: prompts of 2,080 fresh tokens, and one that shares its
// first 2,048 with a prompt answered before. Time from the call to the first token, as the caller sees it. Prints
// medians and minima, and the median of each round's ratio, which other work on the machine moves least.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "agentd/in_process_client.h"
#include "agentd/server/router_server.h"
#include "agentd/service.h"
#include "kvshare/client.h"
#include "runtime/model.h"
#include "tests/testing/temp_dir.h"

namespace kvshare {
namespace {

constexpr std::size_t kShared = 2048;
constexpr std::size_t kFresh = 32;

[[noreturn]] void Fail(const Status& status) {
  std::fprintf(stderr, "served: %s\n", status.message().c_str());
  std::exit(1);
}

template <typename T>
T OrFail(Result<T> result) {
  if (!result.ok()) Fail(result.status());
  return *std::move(result);
}

// Milliseconds to the one token; `reused` must be of the prompt's beginning, or next to nothing where it is 0.
double FirstToken(Client& client, const TokenPrompt& prompt, std::size_t reused) {
  const auto start = std::chrono::steady_clock::now();
  const GenerateReply reply = OrFail(client.GenerateAll({.prompt = prompt, .max_tokens = 1, .ignore_eos = true}));
  const double took = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  const auto found = static_cast<std::size_t>(reply.reuse.prefix_tokens);
  if (reused == 0 ? found > 4 : found != reused) {
    Fail(Internal(std::to_string(found) + " tokens were reused where " + std::to_string(reused) + " should be"));
  }
  return took;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Row(const char* what, const std::vector<double>& times) {
  std::printf("%-46s median %9.2f ms  least %9.2f ms\n", what, Median(times),
              *std::min_element(times.begin(), times.end()));
}

std::vector<double> Ratios(const std::vector<double>& of, const std::vector<double>& to) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < of.size(); ++i) ratios.push_back(of[i] / to[i]);
  return ratios;
}

int Main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: served MODEL [ROUNDS]\n");
    return 2;
  }
  const int rounds = argc > 2 ? std::max(1, std::atoi(argv[2])) : 15;
  const kvshare::testing::TempDir dir;
  const std::unique_ptr<agentd::Service> service =
      OrFail(agentd::NewService(OrFail(runtime::LoadModel(argv[1], {})), {}));
  const auto server = OrFail(agentd::StartRouterServer(service.get(), {.endpoint = "ipc://" + dir.File("d.sock")}));
  const std::unique_ptr<Client> served = OrFail(Connect({.endpoint = server->endpoint()}));
  const std::unique_ptr<Client> inside = agentd::NewInProcessClient(service.get());
  std::mt19937 rng(1);
  const auto fresh = [&rng](TokenPrompt prompt, std::size_t tokens) {
    for (std::size_t i = 0; i < tokens; ++i) prompt.ids.push_back(static_cast<TokenId>(100 + rng() % 1900));
    return prompt;
  };
  FirstToken(*served, fresh({}, kShared + kFresh), 0);

  std::vector<double> over, within, hits;
  for (int i = 0; i < rounds; ++i) {
    TokenPrompt prompt = fresh({}, kShared + kFresh);
    const auto ask_within = [&] { within.push_back(FirstToken(*inside, fresh({}, kShared + kFresh), 0)); };
    if (i % 2 == 0) ask_within();
    over.push_back(FirstToken(*served, prompt, 0));
    if (i % 2 != 0) ask_within();
    prompt.ids.resize(kShared);
    hits.push_back(FirstToken(*served, fresh(prompt, kFresh), kShared));
  }
  Row("2,080 fresh tokens, in process", within);
  Row("2,080 fresh tokens, over ipc", over);
  Row("2,048 of 2,080 tokens an exact hit, over ipc", hits);
  std::printf(
      "the daemon adds %+.2f %% (median of rounds; by the least times %+.2f %%)\n",
      100 * (Median(Ratios(over, within)) - 1),
      100 * (*std::min_element(over.begin(), over.end()) / *std::min_element(within.begin(), within.end()) - 1));
  std::printf("an exact hit takes %.2f %% of computing (median of rounds)\n", 100 * Median(Ratios(hits, over)));
  server->DrainAndStop();
  return 0;
}

}  // namespace
}  // namespace kvshare

int main(int argc, char** argv) { return kvshare::Main(argc, argv); }
