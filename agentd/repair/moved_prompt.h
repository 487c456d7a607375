// MovedPrompt: computes a prompt of which some chunks' KV stands elsewhere (docs/design/repair.md).
//
//   prompt:  |-- exact prefix --|-- fresh --|-- moved --|-- fresh --|-- moved --|-- fresh: the suffix --|
//            |-------- the lead: exact -----|-------------------- approximate ---------------------------|
//
// What attention sees: the lead in pages of its own, computed as plain prefill would; each moved chunk's pages where
// they lie, shared with everyone, at a shift and with a skip mask for the rows that were replaced; and two private runs
// with explicit positions: the fresh rows after the lead (and later the generated ones), and the replaced rows. No page
// is copied but the prefix's last, partly matching one.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "agentd/repair/device_anchors.h"
#include "agentd/repair/token_scores.h"
#include "anchors/anchor_pool.h"
#include "kernels/paged_kv.h"
#include "kvshare/status.h"
#include "kvshare/types.h"
#include "runtime/forward_batch.h"
#include "runtime/layer_gate.h"
#include "runtime/layer_hook.h"
#include "runtime/model.h"

namespace kvshare::agentd {

// A run of prompt tokens whose KV is stored at another place. The caller keeps the pages alive and unchanged.
struct MovedChunk {
  std::int64_t start = 0;   // in the prompt
  std::int64_t length = 0;  // >= 1; ends before the prompt's last token
  std::vector<kernels::PageIndex> pages;
  int first = 0;            // page row of the first token in pages[0]
  std::int64_t base = 0;    // position at which the KV was computed
  bool in_company = false;  // it was computed to see what it would see here (InCompany)
  int depth = 0;            // 0: the KV is exact; else one more than the deepest that it was computed over
  std::string placeholder;  // KVCOMM: which hole of its reader's template this fills
  std::string content;      // names the tokens
};

// CacheBlend's gradual filtering (docs/design/repair.md): what is kept at the check layer and at those after it, each
// as a multiple of the wished share. The paper has them fall and names no numbers; these are ours.
inline constexpr double kGradualFilter[] = {1.5, 4.0 / 3, 7.0 / 6, 1};

struct RepairOptions {
  ReuseMode mode = ReuseMode::kAuto;  // an approximate one
  // Share of moved tokens to recompute (in every layer); < 0: the policy's own. What a policy spends on choosing them
  // comes on top. At 1 nothing is reused: the prompt is computed as if nothing were stored.
  double recompute_ratio = -1;
  // kCacheBlend without a share of its own: rows that may be computed at no cost, because the chunks are still being
  // loaded meanwhile. More than 15 % is computed where that allows it (CacheBlend's loading controller, §5.1).
  std::int64_t rows_while_loading = 0;
  // kCacheBlend: of that share, what is kept at the check layer, at the next one and so on; never rising, the last
  // is 1. In a model with fewer layers after the check layer the first are left out. Empty: tokens are chosen once.
  std::vector<double> filter;
  // kAuto: where the likeliest next token is not ahead by this margin, in nats, the answer is not trusted and the
  // prompt is computed (anchors::Guard). The first where all chunks are one thread (MovedPrompt::OneThread), the second
  // elsewhere.
  double min_margin = 0.7;
  double min_margin_elsewhere = 3.0;
};

// The prompt's tokens and the price of them. Pairs are (token, layer) whose K and V were computed, of the moved tokens
// alone; layers computed only to choose tokens count in full, and so does work that was thrown away.
struct RepairCounts {
  std::int64_t moved = 0;       // tokens reused at another place, as stored or corrected
  std::int64_t recomputed = 0;  // tokens computed although a chunk was at hand
  std::int64_t computed_pairs = 0;
  std::vector<std::int64_t> chunk_pairs;  // the same by chunk
  bool exact = false;                     // all was computed: the answer is exact
  std::string_view reason;                // why, where `exact`: a miss reason
};

// One thread, the one that owns the model. Must not outlive what it is given.
class MovedPrompt {
 public:
  struct Prefix {
    std::vector<kernels::PageIndex> pages;  // the last one perhaps in part
    std::int64_t tokens = 0;
    std::int64_t full_tokens() const { return tokens / kernels::kPageTokens * kernels::kPageTokens; }
  };

  // `pages` is the memory of all pages. `chunks` ascending and disjoint, beyond the prefix. `anchors` may be null
  // unless the mode is kKvcomm, and `agent` names the reader for it; so may `device_anchors` where the host reads the
  // backend's memory.
  MovedPrompt(runtime::Model* model, const kernels::KvPages& pages, std::vector<TokenId> prompt, Prefix prefix,
              std::vector<MovedChunk> chunks, const RepairOptions& options, anchors::AnchorPool* anchors,
              std::string agent, DeviceAnchors* device_anchors = nullptr);
  ~MovedPrompt();
  MovedPrompt(const MovedPrompt&) = delete;
  MovedPrompt& operator=(const MovedPrompt&) = delete;

  // True when all chunks are in company.
  bool OneThread() const;

  // Whether Prefill can be called: not where it has to look at rows that the host does not reach and the backend does
  // not look at in its stead.
  bool RunsOnBackend() const;

  // Rows through all layers that Prefill takes if nothing is doubtful, the work of choosing included; at most. To be
  // compared with what computing the prompt would take: prompt tokens minus the prefix.
  std::int64_t RowsToCompute() const;

  // Private pages that the prompt and `new_tokens` after it can take at most, Recompute included.
  std::int64_t PagesNeeded(std::int64_t new_tokens) const;
  // The same without Recompute.
  std::int64_t PagesToBegin(std::int64_t new_tokens) const;
  // Before Prefill: `private_pages` of at least PagesToBegin(new_tokens) entries.
  void GivePages(std::vector<kernels::PageIndex> private_pages, std::int64_t new_tokens);
  // Before Recompute, where GivePages had fewer than PagesNeeded: the rest of them.
  void GiveMorePages(std::span<const kernels::PageIndex> private_pages);

  // Until the next call, chunks' KV comes while Prefill runs: every step waits for what it sees of a layer, and where
  // some of it is lost, Prefill returns DataLoss before anything is made of it. Null: all is there.
  void Await(runtime::LayerGate* gate) { gate_ = gate; }
  // The KV of this chunk lies on these pages now, at the same rows.
  void MoveChunk(std::size_t chunk, std::vector<kernels::PageIndex> pages);

  // From now on what computes takes `rows` at a time and asks before each time: where `go_on` says no, it returns
  // Cancelled and this object is of no more use. Changes no result.
  void Interruptible(std::int64_t rows, std::function<bool()> go_on);

  // Computes the prompt; writes the last row's logits [vocab]. Returns the backend's failure, if it has any.
  Status Prefill(float* logits);
  // True when the guard does not trust what the logits say: the caller should Recompute and ask again. Always false
  // once all is exact. In modes without a guard, and after the answer's first kGuardedTokens, only where no token is
  // possible (runtime::CheckLogits).
  bool Doubtful(std::span<const float> logits);
  // The smallest margin that Doubtful has seen while it could doubt; infinity before.
  double least_margin() const { return least_margin_; }
  // Computes everything so far (prompt and appended tokens) after the lead exactly, and the logits of the last row.
  // From then on KV lies in one run: the prefix's full pages, then the private ones. `reason`: a miss reason that
  // counts unless it was exact before.
  Status Recompute(float* logits, std::string_view reason = "quality_guard");
  // Computes `ids` after what is there and writes one row of logits per id. At most as many as GivePages promised.
  Status Append(std::span<const TokenId> ids, float* logits);
  // The same for one token whose row shares a step with other sequences' rows: adds the row, and what it sees, to
  // `batch`. What is added points into this object until the next call.
  void AddRow(TokenId id, runtime::ForwardBatch* batch);
  // Forgets all but the prompt and the first `count` tokens after it.
  void KeepAppended(std::int64_t count);

  static constexpr std::int64_t kGuardedTokens = 16;

  std::int64_t tokens() const { return static_cast<std::int64_t>(tokens_.size()); }
  // kKvcomm: the prompt was computed, and anchors are to learn from it: once, as long as its chunks' pages stay as they
  // are. `pages` is its page table now.
  bool HasLesson() const { return lesson_.has_value(); }
  void Teach(std::span<const kernels::PageIndex> pages);

  const RepairCounts& counts() const { return counts_; }
  const std::vector<MovedChunk>& chunks() const { return chunks_; }

  // Tokens before the first chunk: their KV is exact, and after Prefill lies in the prefix's full pages and the first
  // private ones, as if nothing had been moved.
  std::int64_t lead_tokens() const { return chunks_.empty() ? prompt_tokens_ : chunks_.front().start; }
  // Rows that stand next to each other in the prompt and in private pages.
  struct FreshRows {
    std::int64_t start = 0;  // position
    std::int64_t length = 0;
    std::vector<kernels::PageIndex> pages;
    int first = 0;  // page row of the first one in pages[0]
  };
  // What was computed after the lead, replaced rows aside: fresh and generated. Empty once all is exact.
  std::vector<FreshRows> fresh() const;

 private:
  class Probe;
  class Sieve;
  struct Run {  // private rows at explicit positions
    std::vector<std::int64_t> positions;
    std::vector<kernels::PageIndex> pages;
    kernels::KvSlot Slot(std::int64_t position) const;
  };
  // Which moved tokens are seen as computed, and not as stored, from a layer on.
  struct Band {
    int first_layer = 0;
    std::vector<std::vector<std::uint64_t>> skips;  // per chunk, per page: those
    std::vector<std::uint64_t> dropped;             // per page of selected_: rows that are none of them; empty: none
  };
  // One of the passes over the layers in which selected tokens are computed: fewer of them in each.
  struct Stage {
    int first_layer = 0;  // K and V of layers [first_layer, end_layer) are computed
    int end_layer = 0;
    std::int64_t tokens = 0;
  };
  // What a computation takes of the layers, as ForwardBatch has it.
  struct Layers {
    int resume_after = -1;
    int stop_after = -1;
    kernels::MatrixView residual;
    kernels::MatrixView queries;
    std::span<const std::int32_t> resumed_rows;  // one for each position
  };

  std::int64_t MovedTokens() const;
  std::int64_t SelectedAtMost() const;
  std::vector<Stage> Stages() const;
  std::int64_t SuffixBegin() const;
  std::int64_t ChunkOf(std::int64_t position) const;  // -1: fresh
  kernels::KvSlot SlotOf(std::int64_t position) const;
  kernels::KvSlot StoredSlotOf(std::int64_t position) const;  // of a moved token
  // What rows at `positions` (ascending) see, which stand in the batch from `row_begin` on.
  void AddSegments(std::span<const std::int64_t> positions, std::int64_t row_begin,
                   std::vector<kernels::KvSegment>* out) const;
  // Computes the rows at `positions` (ascending) in steps that fit the model.
  Status Compute(std::span<const std::int64_t> positions, runtime::LayerHook* hook, const Layers& layers,
                 float* last_logits, float* all_logits);
  std::vector<std::int64_t> FreshPositions() const;  // after the lead
  std::vector<std::int64_t> RowsOfTheLead() const;   // that are not stored
  std::vector<std::int64_t> MovedPositions() const;
  // These moved rows are computed from now on: they get a place of their own and their stored twins are skipped.
  void Select(std::vector<std::int64_t> positions);
  void SkipStored(std::int64_t position, Band* band) const;
  // Of the selected rows only these (ascending) are seen as computed from this layer on.
  void KeepSelected(std::span<const std::int64_t> positions, int layer);
  void Push(TokenId id);
  void Charge(std::span<const std::int64_t> positions, std::int64_t layers);

  Status PrefillByMode(float* logits);
  Status PrefillSelected(float* logits);
  Status PrefillWithAnchors(float* logits);
  Status PrefillToTeach(const kernels::RopeTable& rope, float* logits);
  Result<std::vector<std::int64_t>> Choose(TokenScores& scores, std::int64_t count) const;
  Result<std::vector<std::int64_t>> ChooseByDeviation(std::int64_t count, bool attention_weighted);
  Status PrefillGradually(float* logits);
  Status PrefillAuto(float* logits);
  Status PrefillPlain(std::string_view reason, float* logits);
  Result<kernels::RopeTable> Rope();
  double Ratio() const;
  double ShareWhileLoading() const;
  int CheckLayer() const;

  runtime::Model* const model_;
  const kernels::KvPages pages_;
  std::vector<TokenId> tokens_;  // prompt, then what was appended
  const std::int64_t prompt_tokens_;
  const Prefix prefix_;
  std::vector<MovedChunk> chunks_;
  const RepairOptions options_;
  anchors::AnchorPool* const anchors_;
  DeviceAnchors* const device_anchors_;
  const std::string agent_;

  std::int64_t rows_per_step_;
  std::function<bool()> go_on_;  // may be empty
  runtime::LayerGate* gate_ = nullptr;
  std::vector<kernels::PageIndex> lead_pages_;
  bool lead_computed_ = false;
  Run fresh_;
  Run selected_;
  std::vector<Band> bands_;                   // ascending, the first from layer 0 on
  bool plain_ = false;                        // one run from position 0, as if nothing were stored
  std::optional<kernels::RopeTable> lesson_;  // what Teach needs
  std::vector<kernels::PageIndex> plain_pages_;
  double least_margin_ = std::numeric_limits<double>::infinity();
  RepairCounts counts_;
};

}  // namespace kvshare::agentd
