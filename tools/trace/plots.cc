#include "tools/trace/plots.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

namespace kvshare::trace {
namespace {

constexpr double kWidth = 900, kHeight = 260, kLeft = 56, kRight = 14, kTop = 10, kBottom = 40;

std::string Text(double x, double y, const char* anchor, const std::string& text) {
  return "<text x=\"" + Fixed(x, 1) + "\" y=\"" + Fixed(y, 1) + "\" text-anchor=\"" + anchor + "\">" +
         EscapeHtml(text) + "</text>\n";
}

std::string Rule(double x1, double y1, double x2, double y2) {
  return "<line x1=\"" + Fixed(x1, 1) + "\" y1=\"" + Fixed(y1, 1) + "\" x2=\"" + Fixed(x2, 1) + "\" y2=\"" +
         Fixed(y2, 1) + "\" stroke=\"var(--line)\"/>\n";
}

std::string Short(double value) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.6g", value);
  return text.data();
}

// A step of 1, 2 or 5 times a power of ten that cuts `span` into four to ten parts.
double NiceStep(double span) {
  const double power = std::pow(10, std::floor(std::log10(span / 4)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (span / (factor * power) <= 8) return factor * power;
  }
  return 10 * power;
}

struct Axis {
  double low = 0;
  double high = 1;
  bool log = false;

  double Place(double x) const {
    const double at =
        log ? (std::log10(x) - std::log10(low)) / (std::log10(high) - std::log10(low)) : (x - low) / (high - low);
    return kLeft + std::clamp(at, 0.0, 1.0) * (kWidth - kLeft - kRight);
  }

  std::vector<double> Ticks() const {
    std::vector<double> ticks;
    if (!log) {
      const double step = NiceStep(high - low);
      for (int i = 0; low + i * step <= high * 1.0001 && i < 50; ++i) ticks.push_back(low + i * step);
      return ticks;
    }
    for (double power = std::pow(10, std::floor(std::log10(low))); power <= high; power *= 10) {
      for (const double factor : {1.0, 2.0, 5.0}) {
        const double tick = factor * power;
        if (tick >= low * 0.9999 && tick <= high * 1.0001) ticks.push_back(tick);
      }
    }
    return ticks;
  }
};

Axis MakeAxis(const LinePlot& plot) {
  Axis axis{.log = plot.log_x};
  double low = 1e300, high = 0;
  for (const Line& line : plot.lines) {
    for (const auto& [x, y] : line.points) {
      if (plot.log_x && !(x > 0)) continue;
      low = std::min(low, x);
      high = std::max(high, x);
    }
  }
  if (plot.x_max > 0) high = plot.x_max;
  axis.low = plot.log_x && low < 1e300 ? low : plot.log_x ? 1 : 0;
  axis.high = high > axis.low ? high : axis.low + 1;
  return axis;
}

}  // namespace

std::string EscapeHtml(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '&': out += "&amp;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      default: out += c;
    }
  }
  return out;
}

std::string Fixed(double value, int digits) {
  if (!std::isfinite(value)) return "-";
  std::array<char, 400> text;
  std::snprintf(text.data(), text.size(), "%.*f", digits, value);
  return text.data();
}

const char* SeriesColour(std::size_t series) {
  static constexpr std::array<const char*, 8> kColours = {"var(--s0)", "var(--s1)", "var(--s2)", "var(--s3)",
                                                          "var(--s4)", "var(--s5)", "var(--s6)", "var(--s7)"};
  return kColours[series % kColours.size()];
}

std::string DrawLines(const LinePlot& plot) {
  const Axis axis = MakeAxis(plot);
  double top = plot.y_percent ? 1 : 0;
  for (const Line& line : plot.lines) {
    for (const auto& [x, y] : line.points) top = std::max(top, y);
  }
  if (top <= 0) top = 1;
  const auto place_y = [&](double y) { return kHeight - kBottom - y / top * (kHeight - kBottom - kTop); };
  std::string svg = "<svg viewBox=\"0 0 " + Fixed(kWidth, 0) + " " + Fixed(kHeight, 0) +
                    "\" role=\"img\" aria-label=\"" + EscapeHtml(plot.label) + "\">\n";
  for (int i = 0; i <= 4; ++i) {
    const double y = top * i / 4;
    svg += Rule(kLeft, place_y(y), kWidth - kRight, place_y(y));
    svg += Text(kLeft - 6, place_y(y) + 4, "end", plot.y_percent ? Fixed(100 * y, 0) + " %" : Short(y));
  }
  double last_label = -1e9;
  for (const double tick : axis.Ticks()) {
    const double x = axis.Place(tick);
    svg += Rule(x, kHeight - kBottom, x, kHeight - kBottom + 4);
    if (x - last_label < 34) continue;
    svg += Text(x, kHeight - kBottom + 17, "middle", Short(tick));
    last_label = x;
  }
  svg += Text((kLeft + kWidth - kRight) / 2, kHeight - 6, "middle", plot.x_title);
  for (const Line& line : plot.lines) {
    std::string points;
    for (const auto& [x, y] : line.points) {
      if (axis.log && !(x > 0)) continue;
      points += (points.empty() ? "" : " ") + Fixed(axis.Place(x), 1) + "," + Fixed(place_y(std::max(y, 0.0)), 1);
    }
    svg += "<polyline points=\"" + points + "\" fill=\"none\" stroke=\"" + line.colour + "\" stroke-width=\"" +
           (line.dashed ? "1.4\" stroke-dasharray=\"6 5" : "2.2\" stroke-linejoin=\"round") + "\"><title>" +
           EscapeHtml(line.name) + "</title></polyline>\n";
  }
  return svg + "</svg>\n";
}

std::string DrawBars(const std::string& label, const std::vector<Bar>& bars, double full) {
  constexpr double kStep = 28, kThick = 19, kNames = 190, kLength = 590;
  for (const Bar& bar : bars) {
    double sum = 0;
    for (const BarPart& part : bar.parts) sum += part.value;
    full = std::max(full, sum);
  }
  if (full <= 0) full = 1;
  std::string svg = "<svg viewBox=\"0 0 " + Fixed(kWidth, 0) + " " +
                    Fixed(kStep * static_cast<double>(bars.size()) + 4, 0) + "\" role=\"img\" aria-label=\"" +
                    EscapeHtml(label) + "\">\n";
  double y = 4;
  for (const Bar& bar : bars) {
    svg += Text(kNames - 8, y + 14, "end", bar.name);
    double x = kNames;
    for (const BarPart& part : bar.parts) {
      const double width = part.value / full * kLength;
      if (width <= 0) continue;
      svg += "<rect x=\"" + Fixed(x, 2) + "\" y=\"" + Fixed(y, 1) + "\" width=\"" + Fixed(width, 2) + "\" height=\"" +
             Fixed(kThick, 0) + "\" fill=\"" + part.colour + "\"><title>" + EscapeHtml(part.title) +
             "</title></rect>\n";
      x += width;
    }
    svg += Text(kNames + kLength + 8, y + 14, "start", bar.note);
    y += kStep;
  }
  return svg + "</svg>\n";
}

std::string DrawKey(const std::vector<std::pair<const char*, std::string>>& entries) {
  std::string html = "<p class=\"keys\">";
  for (const auto& [colour, name] : entries) {
    html += "<span><i style=\"background:" + std::string(colour) + "\"></i>" + EscapeHtml(name) + "</span> ";
  }
  return html + "</p>\n";
}

}  // namespace kvshare::trace
