// A small world that agents write notes about, and questions whose answers are computed from the notes: the same
// grammar as the text that the judge's model was trained on (docs/design/quality-judge.md), so that exact prefill
// answers nearly everything and what is lost is the policy's doing. Every kind of question breaks another way when
// notes are reused without the notes before them:
//
//   one_hop   one note answers                      two_hop  two notes must be joined
//   coref     "this person" is an earlier note's    override a later note corrects an earlier one
//   bound     "the same as" a fact of an earlier note
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bench/quality/random.h"

namespace kvshare::quality {

// A fact as an agent noted it. Several notes make one message.
struct Note {
  std::string author;
  std::string text;
};

struct Question {
  std::string kind;
  std::string text;
  std::string answer;
  std::vector<int> notes;  // the notes it takes to answer, the one that states the answer last
};

struct Message {
  std::string author;
  std::string text;
  int first_note = 0;  // notes [first_note, end_note) make it
  int end_note = 0;
};

// One conversation: a reader with a role and a task, what the team wrote, what it is asked.
struct WorldSample {
  std::string agent;
  std::string role;
  std::string task;
  std::vector<Message> messages;
  std::vector<Question> questions;

  // The message that holds a note.
  int MessageOf(int note) const;
  // Whether a question's notes lie in more than one message.
  bool CrossesMessages(const Question& question) const;
};

// A reader's prompt prefix: with the same one, prompts begin alike.
struct Reader {
  std::string agent;
  std::string role;
  std::string task;
};
Reader MakeReader(Random* random);

// `num_notes` notes by chance, in messages of 1 to 6 notes; all questions they can answer, shuffled.
WorldSample MakeWorld(Random* random, const Reader& reader, int num_notes);

// Agents hand facts on: each message refers to the one before ("the same job as"), and the question asks at the end of
// the chain of `hops` messages. Kind "relay". Other agents' notes stand between.
WorldSample MakeRelay(Random* random, const Reader& reader, int hops);

// Candidates described by one message each; the question asks which of them it is. Kind "judge".
WorldSample MakeCandidates(Random* random, const Reader& reader, int candidates);
// The same with the messages in reverse order: every answer stays what it was.
WorldSample SwapOrder(const WorldSample& sample);

// Messages that do not refer to each other; one note answers. Kind "control".
WorldSample MakeControl(Random* random, const Reader& reader, int num_messages);

}  // namespace kvshare::quality
