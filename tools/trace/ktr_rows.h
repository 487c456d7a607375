// Lines of KTR-1 and of Mooncake's traces (whose four fields KTR-1 keeps) to a trace under construction.
#pragma once

#include <nlohmann/json.hpp>

#include "kvshare/status.h"
#include "tools/trace/builder.h"

namespace kvshare::trace {

// InvalidArgument names the field and what is wrong with it; FailedPrecondition for a version other than 1;
// ResourceExhausted beyond the builder's bounds.
Status AddKtrHeader(const nlohmann::json& json, TraceBuilder* builder);
Status AddKtrSegment(const nlohmann::json& json, TraceBuilder* builder);
Status AddKtrRequest(const nlohmann::json& json, TraceBuilder* builder);

}  // namespace kvshare::trace
