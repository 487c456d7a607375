// Recorded messages to the token ids that a model is asked with.
#pragma once

#include <cstdint>
#include <vector>

#include "kvshare/client.h"
#include "kvshare/status.h"
#include "tools/trace/trace.h"

namespace kvshare::trace {

struct PreparedPrompt {
  std::size_t request = 0;  // index into the trace
  std::vector<TokenId> ids;
  int max_tokens = 0;      // decoded, whatever the model says
  bool truncated = false;  // cut at its front to fit the window
};

struct PromptOptions {
  std::int64_t window = 0;  // the model's, prompt and reply together
  int max_output = 0;       // 0: as recorded
};

// Renders requests through the client's chat template, one at a time.
//
// Roles: `developer` and `tools` become `system`; a role that the template refuses or drops becomes `user`;
// neighbouring system messages are joined. A model without a template gets "role: text" paragraphs. A prompt longer
// than the window loses whole messages at its front, the leading system message kept; when one message still does not
// fit, the longest one loses text at its own front. Either counts as truncated.
class PromptBuilder {
 public:
  // `client` and `trace` must outlive it.
  PromptBuilder(Client* client, const Trace* trace, const PromptOptions& options);

  // Asks the template which of the trace's roles it takes. To be called first.
  Status ProbeRoles();
  // InvalidArgument for a request without text (a hash trace).
  Result<PreparedPrompt> Build(std::size_t request);

 private:
  struct Message {
    std::string role;
    std::string text;
  };
  std::string MappedRole(const std::string& role) const;
  std::vector<Message> Messages(const TraceRequest& request) const;
  Result<std::vector<TokenId>> Render(const std::vector<Message>& messages);
  static void DropFront(std::size_t kept, std::int64_t excess, std::vector<Message>* messages);
  Status CutLongest(std::int64_t excess, std::vector<Message>* messages);
  Result<int> OutputTokens(const TraceRequest& request);

  Client* client_;
  const Trace* trace_;
  PromptOptions options_;
  bool has_template_ = true;
  std::vector<std::string> unknown_roles_;
};

}  // namespace kvshare::trace
