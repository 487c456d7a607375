// Plots as SVG text for a page that loads nothing: colours come from the page's CSS variables, so that they are
// readable on light and dark.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvshare::trace {

std::string EscapeHtml(std::string_view text);
std::string Fixed(double value, int digits);  // "12.30"; "-" when it is not finite
const char* SeriesColour(std::size_t series);

struct Line {
  std::string name;
  std::vector<std::pair<double, double>> points;  // x ascending
  const char* colour = "";
  bool dashed = false;
};

struct LinePlot {
  std::string label;      // for those who do not see it
  std::string x_title;    // below the axis
  bool log_x = false;     // points at x <= 0 are left out
  double x_max = 0;       // 0: the largest of the points
  bool y_percent = true;  // 0..1 as 0..100 %
  std::vector<Line> lines;
};
std::string DrawLines(const LinePlot& plot);

struct BarPart {
  double value = 0;
  const char* colour = "";
  std::string title;  // shown on hover
};
struct Bar {
  std::string name;
  std::vector<BarPart> parts;
  std::string note;  // behind the bar
};
// Horizontal bars, each stacked from its parts, all to the scale of the longest.
std::string DrawBars(const std::string& label, const std::vector<Bar>& bars, double full = 0);

// Colour keys in a row.
std::string DrawKey(const std::vector<std::pair<const char*, std::string>>& entries);

}  // namespace kvshare::trace
