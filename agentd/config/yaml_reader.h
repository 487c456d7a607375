// The part of YAML that a configuration file may use: one document, sections that map names to single values.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"

namespace kvshare::agentd {

struct YamlEntry {
  std::string section;  // "" for what stands at the top, such as `version`
  std::string name;     // "" for an empty section, which is listed so that its name can be checked
  std::string value;
  bool quoted = false;  // in quotes or a block: text, whatever it looks like
  bool null = false;    // ~, null, or nothing
  int section_line = 0;
  int line = 0;  // of the name, counted from 1
};

// At most 1 MiB of text. InvalidArgument beginning with "LINE: " for what is no YAML or more than the part above:
// lists, deeper maps, anchors, aliases, tags, several documents, a name or a section given twice.
Result<std::vector<YamlEntry>> ReadYaml(std::string_view text);

}  // namespace kvshare::agentd
