// Recorded messages to the token ids that a model is asked with.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kvshare/client.h"
#include "kvshare/status.h"
#include "tools/trace/synthesis.h"
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

// Makes a request's prompt, one at a time.
//
// Messages go through the client's chat template. `developer` and `tools` become `system`; a role that the template
// refuses or drops becomes `user`; neighbouring system messages are joined. A model without a template gets "role:
// text" paragraphs. Content of role `raw` is the prompt as it stands, and block ids are made into tokens (synthesis.h).
//
// A prompt longer than the window loses whole messages at its front, the leading system message kept; when one message
// still does not fit, the longest one loses text at its own front. A prompt of tokens loses whole blocks at its front.
// Either counts as truncated.
class PromptBuilder {
 public:
  // `client` and `trace` must outlive it.
  PromptBuilder(Client* client, const Trace* trace, const PromptOptions& options);

  // Asks the template which of the trace's roles it takes. To be called first.
  Status ProbeRoles();
  // Every failure names the request. InvalidArgument for token ids that the model does not have.
  Result<PreparedPrompt> Build(std::size_t request);

  // A segment's content as text: token ids through the client's tokenizer, withheld content made up.
  Result<std::string> SegmentText(std::uint32_t segment);

 private:
  struct Message {
    std::string role;
    std::string text;
  };
  std::string MappedRole(const std::string& role) const;
  Result<const Vocabulary*> Words();
  Result<std::vector<Message>> Messages(const TraceRequest& request);
  Result<PreparedPrompt> BuildMessages(PreparedPrompt prompt, std::int64_t room);
  Result<PreparedPrompt> BuildTokens(PreparedPrompt prompt, std::int64_t room);
  Result<PreparedPrompt> BuildRaw(PreparedPrompt prompt, std::int64_t room);
  Result<std::vector<TokenId>> Render(const std::vector<Message>& messages);
  static void DropFront(std::size_t kept, std::int64_t excess, std::vector<Message>* messages);
  Status CutLongest(std::int64_t excess, std::vector<Message>* messages);
  Result<int> OutputTokens(const TraceRequest& request);

  Client* client_;
  const Trace* trace_;
  PromptOptions options_;
  bool has_template_ = true;
  std::vector<std::string> unknown_roles_;
  std::optional<Vocabulary> vocabulary_;  // made when something has to be made up
};

}  // namespace kvshare::trace
