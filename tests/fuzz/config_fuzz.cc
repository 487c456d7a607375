// config.json of any bytes and, after a zero byte, generation_config.json.
#include <cmath>
#include <cstdlib>

#include "runtime/model_config.h"
#include "runtime/rope.h"
#include "tests/fuzz/seeded.h"
#include "tests/testing/tiny_model.h"

namespace kvshare {
namespace {

std::vector<std::string> Seeds() {
  std::vector<std::string> seeds;
  for (const char* family : {"llama", "qwen2", "qwen3", "mistral"}) {
    testing::TinyModelOptions options;
    options.family = family;
    const std::string config = testing::TinyConfigJson(options);
    seeds.push_back(config);
    seeds.push_back(config + std::string(1, '\0') + R"({"eos_token_id":[1,2]})");
    for (const char* rope : {R"({"rope_type":"llama3","factor":8,"low_freq_factor":1,"high_freq_factor":4,)"
                             R"("original_max_position_embeddings":64})",
                             R"({"type":"yarn","factor":4,"original_max_position_embeddings":64,"beta_fast":32,)"
                             R"("mscale":0.7,"mscale_all_dim":1})",
                             R"({"type":"linear","factor":2})"}) {
      std::string with = config;
      with.insert(with.find("\"rope_scaling\""), std::string("\"rope_parameters\":") + rope + ",");
      seeds.push_back(with);
    }
    std::string window = config;
    window.insert(
        1, R"("sliding_window":16,"use_sliding_window":true,"layer_types":["sliding_attention","full_attention"],)");
    seeds.push_back(window);
  }
  return seeds;
}

}  // namespace
}  // namespace kvshare

KVS_FUZZ_SEEDS(kvshare::Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kvshare;
  const std::string text(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = text.find('\0');
  const std::string config = text.substr(0, zero);
  const auto parsed = runtime::ParseHfConfig(config, zero == std::string::npos ? "" : text.substr(zero + 1));
  if (!parsed.ok()) return 0;
  // What passes is fit to be computed with.
  if (!parsed->Validate().ok()) std::abort();
  for (const double f : runtime::RopeFrequencies(parsed->rope, parsed->head_dim)) {
    if (!std::isfinite(f) || f < 0) std::abort();
  }
  if (!std::isfinite(runtime::RopeAttentionFactor(parsed->rope))) std::abort();
  return 0;
}
