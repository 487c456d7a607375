// How sure an approximate answer is, and what that is worth: the guard's measure and its calibration.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace kvshare::anchors {

// How much likelier the likeliest token is than the next: the difference of their logits, which is the logarithm of the
// ratio of their probabilities, in nats. NaN counts as impossible; 0 where nothing is likeliest. Requires at least two
// logits.
double Margin(std::span<const float> logits);

// KL(exact || other) of two rows of logits, in nats, in double precision; at least 0. Requires equal, non-zero sizes.
double KlDivergence(std::span<const float> exact, std::span<const float> other);

// Upper end of the one-sided Clopper-Pearson interval: the largest probability under which seeing at most `failures` of
// `trials` is still as likely as 1 - confidence. 1 with no trials. Requires 0 <= failures <= trials, 0 < confidence
// < 1.
double ClopperPearsonUpper(std::int64_t failures, std::int64_t trials, double confidence);

// The margin that an answer must have to be trusted. How peaked distributions are differs from model to model and from
// task to task, so no fixed number serves: this one moves until a given share of requests is sent back, the least sure
// ones, by stochastic approximation of the quantile (Robbins and Monro 1951). Where the margin is small, a step is a
// share of it: a fixed one is coarse there, and sends back more than it was told to. It starts strict, and until one
// answer has it, it halves: models whose answers all lie near ties would have a team's whole talk sent back before such
// steps had come down to them.
class GuardMargin {
 public:
  double value() const { return value_; }
  void Answered(bool doubted) {
    reached_ = reached_ || !doubted;
    if (!reached_) return MoveTo(value_ / 2);
    const double step = kShare * value_ < kMostStep ? kShare * value_ : kMostStep;
    MoveTo(value_ + step * (doubted ? kDoubtedShare - 1 : kDoubtedShare));
  }

  // `reached`: answers have been seen before.
  void Restore(double value, bool reached) {
    MoveTo(value);
    reached_ = reached;
  }

  static constexpr double kDoubtedShare = 0.15;
  static constexpr double kLeast = 0.02;  // nats: a tie, in which either token is as good
  static constexpr double kMost = 4.0;    // 55 : 1

 private:
  void MoveTo(double value) { value_ = value < kLeast ? kLeast : value > kMost ? kMost : value; }

  static constexpr double kMostStep = 0.1;  // nats
  static constexpr double kShare = 0.3;
  double value_ = 0.7;
  bool reached_ = false;  // an answer had the margin
};

struct AuditLimits {
  double kl = 0.05;                  // nats: an answer further from exact than this is a failure
  double failure_rate = 0.02;        // what is tolerated among accepted answers
  double early_failure_rate = 0.10;  // while there are too few audits to say that of any margin
  double confidence = 0.95;          // of that statement
  std::size_t window = 512;          // audits remembered, the oldest forgotten first
};

// Audits: pairs of what the guard saw and what an exact recomputation then measured. From them comes the smallest
// margin that may be accepted, with a stated confidence instead of taste (docs/design/repair.md).
class AuditBook {
 public:
  explicit AuditBook(const AuditLimits& limits = {}) : limits_(limits) {}

  void Record(double margin, double kl);

  // The margin to ask, of those >= floor. Audits with a margin below floor do not count.
  // - Once there are audits enough to say so (149 with the defaults): the least t such that failures among audits with
  //   margin >= t are surely rare, ClopperPearsonUpper(failures, audits) <= failure_rate. Where it is true of none,
  //   `prior`, or where that bound is least, whichever is more: after one failure it is true of none for a while.
  // - Before: the same with early_failure_rate (from 29 on), or `prior` while that is true of none either.
  // - In both cases, where nothing is sure: no t above which failures are surely not rare, where as many of as many
  //   would be seen with probability 1 - confidence at most, were failure_rate true.
  double Threshold(double floor, double prior) const;

  // What is remembered, oldest first.
  struct Audit {
    double margin = 0;
    bool failed = false;
  };
  std::vector<Audit> Recent() const;
  // In place of what is remembered; at most a window of them, the newest.
  void Restore(std::span<const Audit> recent);

  std::int64_t audits() const { return recorded_; }
  std::int64_t failures() const { return failures_; }  // of all recorded

 private:
  void Remember(const Audit& audit);
  // The least threshold, of audits in descending order of margin, above which failures are surely at most that rare
  // (infinity: there is none), or are not surely less rare (0: all of them). Of equal margins, failures come first.
  double LeastWith(double failure_rate, std::span<const Audit> sorted) const;
  double LeastUnrefuted(double failure_rate, std::span<const Audit> sorted) const;
  // The threshold above which the bound on failures is least; infinity without audits.
  double LeastBound(std::span<const Audit> sorted) const;

  AuditLimits limits_;
  std::vector<Audit> recent_;
  std::size_t next_ = 0;
  std::int64_t recorded_ = 0;
  std::int64_t failures_ = 0;
};

// Whether answers over chunks of one kind are trusted: the margin that is asked of them, and how often they miss it.
// What audits can say with confidence holds; the quantile lies below it as a floor, because the likelier of two tokens
// can change where their margin is small however near the distributions are.
class Guard {
 public:
  // Before anything is known of answers: the margin that is asked of them at least, and how often they miss it.
  struct Prior {
    double margin = 0;
    double doubts = 0;  // share of answers
  };
  explicit Guard(const Prior& prior) : prior_(prior), audited_(prior.margin) {}

  // What it has learnt.
  struct State {
    double quantile = GuardMargin().value();  // nats
    std::vector<double> least;                // of the last answers, oldest first; nats
    std::vector<AuditBook::Audit> audits;     // oldest first
  };
  State Snapshot() const;
  // Goes on from what another guard has learnt.
  void Restore(const State& state);

  double margin() const { return audited_ < quantile_.value() ? quantile_.value() : audited_; }  // nats
  // Asked where audits bear out no margin: more than any answer has.
  static constexpr double kNever = 1e6;
  // Share of answers whose least sure watched token is not that sure.
  double DoubtRate() const;

  // The least sure token that was watched in an answer, or in the part of it before it was sent back; infinity where
  // none was watched.
  void Answered(double least_margin);
  // A token of an answer, and how far its distribution was from exact, in nats.
  void Audited(double margin, double kl);

 private:
  void Remember(double least_margin);
  void Learn();

  static constexpr std::size_t kRemembered = 64;  // answers
  static constexpr double kPriorWeight = 4;       // as many answers

  Prior prior_;
  GuardMargin quantile_;
  AuditBook book_;
  double audited_;             // what the book asks; at most kNever
  std::vector<double> least_;  // of the last answers
  std::size_t next_ = 0;
};

}  // namespace kvshare::anchors
