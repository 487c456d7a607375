#include "agentd/config/yaml_reader.h"

#include <yaml.h>

#include <cstdint>
#include <set>
#include <utility>

#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kMaxBytes = 1 << 20;
constexpr std::size_t kMaxEntries = 1000;  // and sections

Status At(std::size_t line, const std::string& what) { return InvalidArgument(std::to_string(line) + ": " + what); }

// One event of libyaml's parser, freed at the end of its life.
class Event {
 public:
  Event() = default;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (parsed_) yaml_event_delete(&event_);
  }

  bool Parse(yaml_parser_t* parser) {
    if (parsed_) yaml_event_delete(&event_);
    parsed_ = yaml_parser_parse(parser, &event_) != 0;
    return parsed_;
  }

  yaml_event_type_t type() const { return event_.type; }
  int line() const { return static_cast<int>(event_.start_mark.line) + 1; }
  const yaml_event_t& raw() const { return event_; }
  std::string Text() const {
    return {reinterpret_cast<const char*>(event_.data.scalar.value), event_.data.scalar.length};
  }
  bool Quoted() const { return event_.data.scalar.style != YAML_PLAIN_SCALAR_STYLE; }

 private:
  yaml_event_t event_{};
  bool parsed_ = false;
};

bool IsNull(const std::string& plain) {
  return plain.empty() || plain == "~" || plain == "null" || plain == "Null" || plain == "NULL";
}

class Reader {
 public:
  explicit Reader(std::string_view text) {
    ok_ = yaml_parser_initialize(&parser_) != 0;
    if (!ok_) return;
    yaml_parser_set_encoding(&parser_, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&parser_, reinterpret_cast<const unsigned char*>(text.data()), text.size());
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() {
    if (ok_) yaml_parser_delete(&parser_);
  }

  Result<std::vector<YamlEntry>> Read() {
    if (!ok_) return ResourceExhausted("1: no memory to read it");
    KVS_RETURN_IF_ERROR(Next());  // the stream begins
    KVS_RETURN_IF_ERROR(Next());
    if (event_.type() == YAML_STREAM_END_EVENT) return At(1, "the file is empty; it must say at least 'version: 1'");
    KVS_RETURN_IF_ERROR(Next());  // after the document's beginning
    if (event_.type() != YAML_MAPPING_START_EVENT) {
      return At(event_.line(), "sections such as 'model:' are expected here");
    }
    KVS_RETURN_IF_ERROR(Top());
    KVS_RETURN_IF_ERROR(Next());  // the document ends
    KVS_RETURN_IF_ERROR(Next());
    if (event_.type() != YAML_STREAM_END_EVENT) return At(event_.line(), "a second document begins; one is all");
    return std::move(entries_);
  }

 private:
  // The next event; refuses what no configuration has.
  Status Next() {
    if (!event_.Parse(&parser_)) {
      const std::string why = parser_.problem == nullptr ? "it cannot be read" : parser_.problem;
      return At(parser_.problem_mark.line + 1, "not YAML: " + why);
    }
    const yaml_event_t& raw = event_.raw();
    switch (event_.type()) {
      case YAML_ALIAS_EVENT: return At(event_.line(), "aliases (*name) are not supported");
      case YAML_SEQUENCE_START_EVENT: return At(event_.line(), "a list; a single value is expected here");
      case YAML_SCALAR_EVENT:
        if (raw.data.scalar.anchor != nullptr) return At(event_.line(), "anchors (&name) are not supported");
        if (raw.data.scalar.tag != nullptr) return At(event_.line(), "tags (!name) are not supported");
        return OkStatus();
      case YAML_MAPPING_START_EVENT:
        if (raw.data.mapping_start.anchor != nullptr) return At(event_.line(), "anchors (&name) are not supported");
        if (raw.data.mapping_start.tag != nullptr) return At(event_.line(), "tags (!name) are not supported");
        return OkStatus();
      default: return OkStatus();
    }
  }

  // A name of a map, or its end (then event_ is MAPPING_END). Requires: event_ is the next in the map.
  Status CheckName(std::set<std::string>* seen) {
    if (event_.type() != YAML_SCALAR_EVENT) return At(event_.line(), "a name is expected here");
    if (entries_.size() >= kMaxEntries) return At(event_.line(), "there are too many values");
    if (!seen->insert(event_.Text()).second) return At(event_.line(), "'" + event_.Text() + "' is given twice");
    return OkStatus();
  }

  void AddValue(YamlEntry entry) {
    entry.value = event_.Text();
    entry.quoted = event_.Quoted();
    entry.null = !entry.quoted && IsNull(entry.value);
    entries_.push_back(std::move(entry));
  }

  Status Top() {
    std::set<std::string> seen;
    while (true) {
      KVS_RETURN_IF_ERROR(Next());
      if (event_.type() == YAML_MAPPING_END_EVENT) return OkStatus();
      KVS_RETURN_IF_ERROR(CheckName(&seen));
      YamlEntry entry{.name = event_.Text(), .section_line = event_.line(), .line = event_.line()};
      KVS_RETURN_IF_ERROR(Next());
      if (event_.type() == YAML_MAPPING_START_EVENT) {
        entry.section = std::exchange(entry.name, "");
        KVS_RETURN_IF_ERROR(Section(entry));
      } else {
        AddValue(std::move(entry));
      }
    }
  }

  Status Section(const YamlEntry& section) {
    std::set<std::string> seen;
    entries_.push_back(section);
    while (true) {
      KVS_RETURN_IF_ERROR(Next());
      if (event_.type() == YAML_MAPPING_END_EVENT) return OkStatus();
      KVS_RETURN_IF_ERROR(CheckName(&seen));
      YamlEntry entry = section;
      entry.name = event_.Text();
      entry.line = event_.line();
      KVS_RETURN_IF_ERROR(Next());
      if (event_.type() != YAML_SCALAR_EVENT) {
        return At(event_.line(), entry.section + "." + entry.name + " is a single value, not a map");
      }
      AddValue(std::move(entry));
    }
  }

  yaml_parser_t parser_{};
  bool ok_ = false;
  Event event_;
  std::vector<YamlEntry> entries_;
};

}  // namespace

Result<std::vector<YamlEntry>> ReadYaml(std::string_view text) {
  if (text.size() > kMaxBytes) return At(1, "the file is larger than 1 MiB");
  return Reader(text).Read();
}

}  // namespace kvshare::agentd
