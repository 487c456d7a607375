#include "runtime/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstring>
#include <string>

#include "runtime/utf8.h"

namespace kvshare::runtime {
namespace {

constexpr char kGpt2Pattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr char kLlama3Pattern[] = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
                                  R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr char kQwen2Pattern[] = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
                                 R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

constexpr std::size_t kMaxPatternBytes = 16384;  // the longest in use has about 1,000
// Steps of one match attempt. The patterns in use take a handful; a hostile one is cut short after milliseconds.
constexpr std::uint32_t kMatchLimit = 1'000'000;
constexpr std::uint32_t kHeapLimitKib = 16 * 1024;

// Oniguruma's pattern as PCRE2 understands it. The two differ where PCRE2's \s has U+180E, its \w lacks marks, its \h
// is blank space instead of a hex digit, and where Oniguruma nests or intersects character classes.
Result<std::string> ToPcre(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char e = pattern[++i];
      const char* members = nullptr;
      switch (e) {
        case 's': out += R"(\p{White_Space})"; continue;
        case 'S': out += R"(\P{White_Space})"; continue;
        case 'w':
        case 'W': members = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})"; break;
        case 'h':
        case 'H': members = "0-9a-fA-F"; break;
        default: out += {c, e}; continue;
      }
      const bool negated = e == 'W' || e == 'H';
      if (in_class && negated) return Unimplemented(std::string("\\") + e + " inside a character class");
      if (in_class) {
        out += members;
      } else {
        out += (negated ? "[^" : "[") + std::string(members) + "]";
      }
      continue;
    }
    if (in_class && c == '&' && pattern.substr(i, 2) == "&&") return Unimplemented("intersection of character classes");
    if (in_class && c == '[') {
      const auto end = pattern.substr(i, 2) == "[:" ? pattern.find(":]", i + 2) : std::string_view::npos;
      if (end == std::string_view::npos) return Unimplemented("a character class inside another");
      out += pattern.substr(i, end + 2 - i);
      i = end + 1;
      continue;
    }
    out += c;
    if (!in_class && c == '[') {
      in_class = true;
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') {
        out += "\\]";  // the first member of a class is itself, even this one
        ++i;
      }
    } else if (in_class && c == ']') {
      in_class = false;
    }
  }
  return out;
}

std::string PcreMessage(int code) {
  PCRE2_UCHAR text[256];
  if (pcre2_get_error_message(code, text, sizeof text) < 0) return "PCRE2 error " + std::to_string(code);
  return reinterpret_cast<const char*>(text);
}

struct Deleter {
  void operator()(pcre2_code* p) const { pcre2_code_free(p); }
  void operator()(pcre2_compile_context* p) const { pcre2_compile_context_free(p); }
  void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
};

}  // namespace

// One compiled step: its matches and the gaps between them are the pieces.
struct PreTokenizer::Pattern {
  std::unique_ptr<pcre2_code, Deleter> code;
  std::unique_ptr<pcre2_match_context, Deleter> context;

  static Result<std::unique_ptr<Pattern>> Compile(std::string_view source) {
    const auto fail = [&](const Status& why) {
      return Status(why.code(), "pattern '" + std::string(source) + "': " + why.message());
    };
    if (source.size() > kMaxPatternBytes)
      return InvalidArgument("a pattern of " + std::to_string(source.size()) + " bytes");
    if (!IsValidUtf8(source)) return InvalidArgument("a pattern that is not UTF-8");
    auto pattern = ToPcre(source);
    if (!pattern.ok()) return fail(pattern.status());
    const std::unique_ptr<pcre2_compile_context, Deleter> compile(pcre2_compile_context_create(nullptr));
    auto out = std::make_unique<Pattern>();
    out->context.reset(pcre2_match_context_create(nullptr));
    if (compile == nullptr || out->context == nullptr) return ResourceExhausted("no memory for a pattern");
    pcre2_set_newline(compile.get(), PCRE2_NEWLINE_LF);
    pcre2_set_match_limit(out->context.get(), kMatchLimit);
    pcre2_set_heap_limit(out->context.get(), kHeapLimitKib);
    int error = 0;
    PCRE2_SIZE offset = 0;
    // Oniguruma's ^ and $ are those of lines, hence MULTILINE.
    out->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern->data()), pattern->size(),
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &offset,
                                  compile.get()));
    if (out->code == nullptr) {
      return fail(InvalidArgument(PcreMessage(error) + " (at byte " + std::to_string(offset) + ")"));
    }
    // Without JIT (an architecture that lacks it) the interpreter gives the same matches, slower.
    pcre2_jit_compile(out->code.get(), PCRE2_JIT_COMPLETE);
    return out;
  }

  void Split(std::string_view text, pcre2_match_data* match, std::vector<std::string_view>* pieces) const {
    // The caller's text is valid UTF-8 and pieces end at characters: checking again at every match would be quadratic.
    const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    std::size_t done = 0;  // text before this is in `pieces`
    std::size_t from = 0;
    const auto take_until = [&](std::size_t end) {
      if (end > done) pieces->push_back(text.substr(done, end - done));
      done = end;
    };
    while (from < text.size()) {
      int rc = pcre2_match(code.get(), subject, text.size(), from, PCRE2_NO_UTF_CHECK, match, context.get());
      if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
        rc = pcre2_match(code.get(), subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, match,
                         context.get());
      }
      if (rc < 0) break;  // no match, or a limit
      const PCRE2_SIZE* span = pcre2_get_ovector_pointer(match);
      if (span[0] < done || span[1] < span[0]) break;  // \K can move a match's start anywhere
      take_until(span[0]);
      take_until(span[1]);
      // An empty match cuts here; the search goes on one character further.
      const bool advanced = span[1] > from;
      if (advanced) from = span[1];
      if ((span[0] == span[1] || !advanced) && from < text.size()) from += Utf8Length(text[from]);
    }
    take_until(text.size());
  }
};

PreTokenizer::PreTokenizer(std::vector<std::unique_ptr<Pattern>> patterns, std::size_t prefix_before)
    : patterns_(std::move(patterns)), prefix_before_(prefix_before) {}
PreTokenizer::~PreTokenizer() = default;

Result<std::unique_ptr<PreTokenizer>> PreTokenizer::Make(const PreTokenizerSpec& spec) {
  std::vector<std::unique_ptr<Pattern>> patterns;
  for (const PreTokenizerSpec::Step& step : spec.steps) {
    std::string_view source;
    switch (step.kind) {
      case PreTokenizerSpec::Step::Kind::kDigits: source = step.individual_digits ? R"(\p{N})" : R"(\p{N}+)"; break;
      case PreTokenizerSpec::Step::Kind::kByteLevelSplit: source = kGpt2Pattern; break;
      case PreTokenizerSpec::Step::Kind::kRegexSplit: source = step.pattern; break;
    }
    auto pattern = Pattern::Compile(source);
    if (!pattern.ok()) return pattern.status();
    patterns.push_back(std::move(*pattern));
  }
  // The space belongs to ByteLevel, which is the last step where it is a step at all.
  std::size_t prefix_before = kNever;
  if (spec.add_prefix_space) {
    const bool split_last =
        !spec.steps.empty() && spec.steps.back().kind == PreTokenizerSpec::Step::Kind::kByteLevelSplit;
    prefix_before = split_last ? patterns.size() - 1 : patterns.size();
  }
  return std::unique_ptr<PreTokenizer>(new PreTokenizer(std::move(patterns), prefix_before));
}

void PreTokenizer::Split(std::string_view text, Words* out) const {
  if (text.empty()) return;
  // One match's offsets. Without memory for that much the allocations to come fail too.
  const std::unique_ptr<pcre2_match_data, Deleter> match(pcre2_match_data_create(1, nullptr));
  std::vector<std::string_view> pieces = {text}, next;
  for (std::size_t i = 0; i <= patterns_.size(); ++i) {
    if (i == prefix_before_) {
      for (std::string_view& piece : pieces) {
        if (!piece.starts_with(' ')) piece = out->storage.emplace_back(" " + std::string(piece));
      }
    }
    if (i == patterns_.size() || match == nullptr) break;
    next.clear();
    for (const std::string_view piece : pieces) patterns_[i]->Split(piece, match.get(), &next);
    pieces.swap(next);
  }
  out->words.insert(out->words.end(), pieces.begin(), pieces.end());
}

Result<PreTokenizerSpec> PreTokenizerByName(std::string_view name) {
  using Kind = PreTokenizerSpec::Step::Kind;
  PreTokenizerSpec spec;
  if (name == "smollm") {
    spec.steps = {{.kind = Kind::kDigits, .individual_digits = true}, {.kind = Kind::kByteLevelSplit}};
  } else if (name == "gpt-2") {
    spec.steps = {{.kind = Kind::kByteLevelSplit}};
  } else if (name == "llama-bpe") {
    spec.steps = {{.kind = Kind::kRegexSplit, .pattern = kLlama3Pattern}};
  } else if (name == "qwen2") {
    spec.steps = {{.kind = Kind::kRegexSplit, .pattern = kQwen2Pattern}};
  } else {
    return Unimplemented("pre-tokenizer '" + std::string(name) + "' (known: smollm, gpt-2, llama-bpe, qwen2)");
  }
  return spec;
}

}  // namespace kvshare::runtime
