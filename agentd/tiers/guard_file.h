// GuardFile: what the guards have learnt of a model's answers, on disk, so that a restart does not begin with distrust
// (docs/design/shadow-audits.md, docs/formats/guard.md).
#pragma once

#include <optional>
#include <string>

#include "anchors/guard_record.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {

// The space of what guards learn where this share of moved tokens is repaired; unset: each mode's own. What is learnt
// of answers that were repaired that much says nothing of others.
Digest GuardSpace(const Digest& space, const std::optional<double>& repaired_share);

class GuardFile {
 public:
  // In `directory`, which is made when there is something to save; under a cold tier's lock.
  GuardFile(std::string directory, const Digest& space);

  // What was saved for this space; empty where that is nothing, or cannot be used (`fault`).
  std::optional<anchors::GuardStates> Load(anchors::AnchorFault* fault) const;
  // In place of what was saved. Not synced: what is lost is learnt again. False when the disk failed.
  bool Save(const anchors::GuardStates& guards) const;

 private:
  const std::string directory_;
  const Digest space_;
  const std::string path_;
};

}  // namespace kvshare::agentd
