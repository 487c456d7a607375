// A Service over the tiny random model: real kernels, tokenizer and template, in milliseconds.
#pragma once

#include <memory>
#include <utility>

#include "agentd/service.h"
#include "gtest/gtest.h"
#include "runtime/model.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::testing {

inline std::unique_ptr<runtime::Model> LoadTinyModel(kernels::DType dtype, std::int64_t max_positions = 1024,
                                                     int threads = 1, int layers = 2, int padding = 0) {
  const TempDir dir;
  TinyModelOptions options;
  options.max_positions = max_positions;
  options.layers = layers;
  options.padding = padding;
  const Status written = WriteTinyModel(dir.path(), options);
  EXPECT_TRUE(written.ok()) << written.message();
  runtime::LoadOptions load;
  load.dtype = dtype;
  load.threads = threads;
  Result<std::unique_ptr<runtime::Model>> model = runtime::LoadModel(dir.path().string(), load);
  EXPECT_TRUE(model.ok()) << model.status().message();
  return model.ok() ? std::move(*model) : nullptr;
}

// `pool_pages`: 0 for room without end. Unless `options` say so, what computing costs is given: large, so that loading
// pays, and so that no plan depends on how fast a test runs.
inline std::unique_ptr<agentd::Service> NewTinyService(kernels::DType dtype, agentd::ServiceOptions options = {},
                                                       std::int64_t pool_pages = 0, int layers = 2,
                                                       std::int64_t max_positions = 1024) {
  std::unique_ptr<runtime::Model> model = LoadTinyModel(dtype, max_positions, 1, layers);
  if (model == nullptr) return nullptr;
  const auto page_bytes = static_cast<std::int64_t>(model->kv_layout().page_bytes());
  if (!options.seconds_per_token.has_value()) options.seconds_per_token = 1;
  options.kv_pool_bytes = page_bytes * (pool_pages == 0 ? 4000 : pool_pages);
  Result<std::unique_ptr<agentd::Service>> service = agentd::NewService(std::move(model), options);
  EXPECT_TRUE(service.ok()) << service.status().message();
  return service.ok() ? std::move(*service) : nullptr;
}

}  // namespace kvshare::testing
