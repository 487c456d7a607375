// kvctl logits: the logits of every token of a prompt, computed through the paged cache in pieces of chosen sizes.
#include <algorithm>
#include <cstdio>
#include <numeric>

#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/files.h"
#include "tools/kvctl/npy.h"
#include "tools/kvctl/sequence.h"
#include "tools/kvctl/target.h"

namespace kvshare::kvctl {
namespace {

// Rows of logits held at once: 256 x 50,000 floats are 50 MB.
constexpr std::int64_t kBlockRows = 256;

Status WriteLogits(runtime::Model& model, const std::vector<TokenId>& ids, const LogitsOptions& options) {
  const auto n = static_cast<std::int64_t>(ids.size());
  const std::int64_t vocab = model.config().vocab_size;
  const std::int64_t asked =
      options.chunks.empty() ? kBlockRows : *std::max_element(options.chunks.begin(), options.chunks.end());
  const std::int64_t most = std::min(asked, model.max_batch_rows());
  KVS_ASSIGN_OR_RETURN(Sequence sequence, Sequence::New(&model, n));
  KVS_ASSIGN_OR_RETURN(NpyWriter npy, NpyWriter::Open(options.out_file, n, vocab));
  std::vector<float> logits(static_cast<std::size_t>(std::min(most, n) * vocab));
  const std::span<const TokenId> all(ids);
  std::size_t piece = 0;
  for (std::int64_t done = 0; done < n;) {
    std::int64_t rows = most;
    if (!options.chunks.empty()) rows = options.chunks[std::min(piece++, options.chunks.size() - 1)];
    rows = std::min({rows, most, n - done});
    std::vector<std::int64_t> wanted(static_cast<std::size_t>(rows));
    std::iota(wanted.begin(), wanted.end(), 0);
    KVS_RETURN_IF_ERROR(sequence.Append(all.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(rows)),
                                        wanted, logits.data()));
    KVS_RETURN_IF_ERROR(npy.Append(std::span(logits).first(static_cast<std::size_t>(rows * vocab))));
    done += rows;
  }
  return npy.Close();
}

}  // namespace

int RunLogits(const LogitsOptions& options) {
  const auto ids = ReadIds(options.ids_file);
  if (!ids.ok()) return Fail(ids.status());
  auto model = LoadModelAt(options.source.model, LoadOptionsOf(options.source));
  if (!model.ok()) return Fail(kModel, model.status().message());
  const runtime::ModelConfig& config = (*model)->config();
  Status status = CheckIds(*ids, config.vocab_size);
  if (status.ok() && static_cast<std::int64_t>(ids->size()) > config.max_positions) {
    status = InvalidArgument(std::to_string(ids->size()) + " tokens do not fit the model's window of " +
                             std::to_string(config.max_positions));
  }
  if (!status.ok()) return Fail(status.WithContext(options.ids_file));
  status = WriteLogits(**model, *ids, options);
  if (!status.ok()) return Fail(status);
  std::printf("{\"tokens\":%zu,\"vocab\":%lld,\"dtype\":\"%s\"}\n", ids->size(),
              static_cast<long long>(config.vocab_size), std::string(kernels::DTypeName(options.source.dtype)).c_str());
  return kOk;
}

}  // namespace kvshare::kvctl
