// kvctl trace report: a replay's report.json in the other forms.
#include <cstdio>

#include "tools/kvctl/commands.h"
#include "tools/kvctl/exit_code.h"
#include "tools/kvctl/files.h"
#include "tools/trace/report.h"

namespace kvshare::kvctl {

int RunTraceReport(const TraceReportOptions& options) {
  const auto json = ReadFile(options.file);
  if (!json.ok()) return Fail(json.status());
  const auto report = trace::ParseReport(*json);
  if (!report.ok()) return Fail(report.status().WithContext(options.file));
  if (!options.html_file.empty()) {
    if (const Status status = WriteFile(options.html_file, trace::ReportHtml(*report)); !status.ok())
      return Fail(status);
  }
  if (!options.csv_file.empty()) {
    if (const Status status = WriteFile(options.csv_file, trace::ReportCsv(*report)); !status.ok()) return Fail(status);
  }
  const bool as_json = options.format == OutputFormat::kJson;
  std::fputs(as_json ? (trace::ReportJson(*report) + "\n").c_str() : trace::ReportText(*report).c_str(), stdout);
  return kOk;
}

}  // namespace kvshare::kvctl
