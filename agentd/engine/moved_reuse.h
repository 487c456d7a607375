// MovedReuse: which parts of a prompt its session has seen elsewhere, whose KV is still in memory, and what it takes to
// use it from where it lies.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "agentd/engine/anchor_shelf.h"
#include "agentd/engine/planner.h"
#include "agentd/engine/request.h"
#include "agentd/engine/stats_book.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/repair/company.h"
#include "agentd/repair/moved_prompt.h"
#include "agentd/repair/session_book.h"
#include "agentd/tiers/guard_file.h"
#include "anchors/anchor_pool.h"
#include "anchors/confidence.h"
#include "kernels/paged_kv.h"
#include "runtime/model.h"

namespace kvshare::agentd {

// A part of a prompt, found.
struct FoundChunk {
  MovedChunk chunk;
  AgentId source = 0;      // whose prompt it stood in
  bool saw_other = false;  // ChunkCompany's
  std::uint64_t run = 0;   // SessionBook's
  Tier tier = Tier::kHost;
};

// A run that is to be in memory before the chunks that were found in it can be used.
struct ChunkLoad {
  std::vector<TokenId> tokens;  // from its beginning to the end of what is stored and wanted of it
  std::size_t pages = 0;        // of them on disk
};

// Where the pages go of a run that is being loaded, `stored.cold`'s, one for each; none where it is not.
using OnTheWay = std::function<std::vector<PageIndex>(std::span<const TokenId> run, const StoredPrefix& stored)>;

struct FoundChunks {
  std::vector<FoundChunk> chunks;                           // ascending, disjoint
  std::vector<FoundChunk> strays;                           // mode auto: rather to be computed (Strays)
  std::vector<std::pair<std::int64_t, std::int64_t>> gone;  // (start, length) of the prompt: seen before, KV not there
  // Until these are in memory, pages of chunks in Tier::kCold are where OnTheWay says, or kNoPage.
  std::vector<ChunkLoad> loads;
  // While these live, the chunks' pages stay as they are.
  std::vector<KvHandle> leases;
  std::vector<std::shared_ptr<const void>> kept;
};

// A prompt computed over found chunks, and all it needs to stay as it is while it runs.
struct MovedWork {
  std::vector<KvHandle> leases;
  std::vector<std::shared_ptr<const void>> kept;
  std::shared_ptr<anchors::AnchorPool> anchors;
  std::unique_ptr<MovedPrompt> prompt;  // null: nothing is moved
  struct Coming {
    std::size_t chunk = 0;        // of the prompt's
    std::vector<TokenId> tokens;  // of the run that it was found in, up to its end
  };
  std::vector<Coming> coming;  // chunks of which pages are on their way
};

struct MovedReuseOptions {
  std::optional<double> blend_recompute;  // ServiceOptions'
  bool blend_gradual = false;             // likewise
  std::string anchor_dir;                 // where anchors, and what the guards learn, are kept; empty: in memory alone
  std::int64_t anchor_bytes = 0;          // that anchors may use there
  std::int64_t anchor_memory = std::int64_t{512} << 20;  // bytes
};

// The engine's thread; all must outlive it. Sessions are strangers to each other: nothing found under one name was
// ever recorded under another.
class MovedReuse {
 public:
  MovedReuse(runtime::Model* model, KvPool* pool, const kernels::KvPages& pages, StatsBook* names,
             const MovedReuseOptions& options, AnchorShelf::Post post);

  // These tokens stood from position 0 in a prompt of `session`, and their KV is in the pool or cold tier, exact.
  void Record(const std::string& session, std::span<const TokenId> tokens, AgentId source) {
    book_.Record(session, tokens, source);
  }

  // An approximate request has ended, whose pages are `kv` and whose tokens with KV are `tokens`. What it computed
  // after its lead is kept for later requests of the session and mode; the lead's pages alone stay in `kv`. Returns the
  // name for Record and Healed.
  std::uint64_t Keep(const EngineRequest& request, std::span<const TokenId> tokens, const MovedPrompt& prompt,
                     KvHandle& kv);
  // All of it is in the pool now, exact: what Keep kept is not needed any more.
  void Healed(const std::string& session, std::span<const TokenId> tokens, AgentId source, std::uint64_t kept);
  // Gives the pages back that were kept longest. False when none are.
  bool Yield();
  // Pages that Keep keeps at the moment.
  std::int64_t kept_pages() const { return kept_pages_; }

  // What of the request's prompt[from, n - 1) can be taken from elsewhere; `new_tokens` may follow the prompt. Empty
  // when its session has seen nothing of it. In mode kvcomm chunks are (parts of) messages, and the first may begin a
  // little before `from` (Messages). `disk`: counts what it finds in the cold tier as if it were in memory; may be
  // null, and so may `on_the_way`.
  FoundChunks Find(const EngineRequest& request, std::int64_t from, std::int64_t new_tokens, const Planner* disk,
                   const OnTheWay& on_the_way) const;

  // The computation of the request's prompt after `prefix`, over `found`, whose leases it takes; pages of its own are
  // still to be given. It can run where nothing of both is on disk. `rows_while_loading`: RepairOptions'. Requires a
  // session and at least one chunk.
  MovedWork Prepare(const EngineRequest& request, const StoredPrefix& prefix, FoundChunks& found,
                    std::int64_t rows_while_loading);
  // What was on its way when it was prepared has come: from now on it lies where it was stored, and is leased. False:
  // not all of it is there.
  bool Settle(MovedWork& work) const;

  // Whether `prompt` should be computed over its chunks: because it can be expected to take less than `plain` rows,
  // which doing without it takes (how often the guard would have such prompts computed after all is part of it), or as
  // a trial. A policy that was asked for by name is used wherever it computes fewer rows; in mode auto each of them
  // counts as `moved_row` (CostMeter's). `trial_rows` is for Admitted. `distrusted`: it is not used, and would be if
  // the guard doubted none.
  struct Decision {
    bool use = false;
    bool distrusted = false;
    double trial_rows = 0;
    double rows = 0;  // of plain prefill: that take as long, to be expected, if it is used
  };
  Decision Decide(const EngineRequest& request, const MovedPrompt& prompt, std::int64_t plain, double moved_row) const;
  // A request was admitted as was decided: this much more may go to trials, or less.
  void Admitted(double trial_rows);
  // A request has ended that reused chunks, or the guard has just had it computed.
  void Answered(const EngineRequest& request, const MovedPrompt& prompt);

  // A token of an answer in mode auto, within what the guard watches, had this margin and was this far from exact, in
  // nats. `one_thread`: MovedPrompt::OneThread of its prompt.
  void Audited(bool one_thread, double margin, double kl);
  // An answer, given or not, had this margin at the least sure token that the guard watches.
  void Watched(bool one_thread, double least_margin);
  // The margin that the guard asks of such answers.
  double margin(bool one_thread) const { return Trusted(one_thread).margin(); }

  // Saves what the guards have learnt, if that has changed.
  void SaveGuards();
  bool guards_to_save() const { return guard_file_.has_value() && guards_changed_; }
  // Why what was saved before could not be used.
  anchors::AnchorFault guard_fault() const { return guard_fault_; }

  // What sessions have taught in mode kvcomm.
  AnchorShelf& anchors() { return anchors_; }
  const AnchorShelf& anchors() const { return anchors_; }

  // What sessions have seen stays known; no page and no anchor stays in memory.
  void LeaveMemory();
  // All but what is on disk.
  void Clear();

 private:
  anchors::Guard& Trusted(bool one_thread) { return one_thread ? thread_ : elsewhere_; }
  const anchors::Guard& Trusted(bool one_thread) const { return one_thread ? thread_ : elsewhere_; }

  static std::unique_ptr<AnchorStore> StoreFor(const runtime::Model& model, const MovedReuseOptions& options);

  runtime::Model* const model_;
  const RoleMarks role_marks_;
  const std::vector<TokenId> message_ends_;
  KvPool* const pool_;
  const kernels::KvPages pages_;
  StatsBook* const names_;
  const std::optional<double> blend_recompute_;
  const bool blend_gradual_;
  DeviceAnchors device_anchors_;  // nothing where the host reads the model's memory
  std::int64_t kept_pages_ = 0;
  std::uint64_t next_kept_ = 1;
  struct KeptRequest {
    std::string session;
    std::uint64_t name = 0;
    std::weak_ptr<const void> pages;
  };
  std::deque<KeptRequest> kept_;  // oldest first; of some the pages are gone
  SessionBook book_;
  anchors::Guard thread_{kThreadPrior};
  anchors::Guard elsewhere_{kElsewherePrior};
  std::optional<GuardFile> guard_file_;
  anchors::AnchorFault guard_fault_ = anchors::AnchorFault::kNone;
  bool guards_changed_ = false;  // since they were saved
  double trial_rows_ = 0;        // that may be computed for plans that are not expected to pay
  AnchorShelf anchors_;
};

}  // namespace kvshare::agentd
