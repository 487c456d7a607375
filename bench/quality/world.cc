#include "bench/quality/world.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <sstream>

#include "libkvshare/core/check.h"

namespace kvshare::quality {
namespace {

std::vector<std::string> Words(const char* text) {
  std::istringstream in(text);
  std::vector<std::string> words;
  for (std::string word; in >> word;) words.push_back(word);
  return words;
}

// The world's vocabulary, as the model saw it in training.
struct Vocabulary {
  std::vector<std::string> names = Words(
      "Ada Ben Cleo Dan Eva Finn Gus Hana Ivan Jade Kai Lena Max Nina Omar Pia Quinn Rosa Sam Tess Uma Vera Wes Xena "
      "Yara Zack Amy Bob Carl Dora Ed Fay Gina Hugo Iris Jack Kate Liam Mona Nick Olga Paul Rita Seth Tina Vince Walt "
      "Zoe");
  std::vector<std::string> jobs =
      Words("pilot baker nurse judge farmer singer tailor miner clerk painter sailor guard chef coach plumber printer");
  std::vector<std::string> cities =
      Words("Paris Rome Oslo Cairo Lima Delhi Tokyo Berlin Madrid Dublin Prague Vienna Lisbon Athens Boston Havana");
  std::vector<std::string> objects =
      Words("key map lamp ring book coin drum flute knife mirror rope scarf sword violin watch compass");
  std::vector<std::string> colors = Words("red blue green black white yellow brown silver golden purple orange grey");
  std::vector<std::string> places = Words(
      "kitchen cellar attic garage library garden tower chapel stable bakery harbor studio office vault market museum");
  std::vector<std::string> animals =
      Words("dog cat horse goat parrot rabbit turtle snake owl fox pony duck crow lizard ferret hamster");
  std::vector<std::string> agents =
      Words("planner researcher coder critic solver writer reviewer analyst tester editor");
  std::vector<std::string> roles = {"You break the task into steps.",
                                    "You collect the facts.",
                                    "You write short answers.",
                                    "You check every claim twice.",
                                    "You answer with one word when you can.",
                                    "You read the notes of the other agents and answer the question.",
                                    "You are careful with names and codes.",
                                    "You trust corrections more than earlier notes.",
                                    "You keep track of who owns what.",
                                    "You never guess. You look it up in the notes.",
                                    "You summarize what the team knows.",
                                    "You are the last agent in the chain. Give the final answer.",
                                    "You speak plainly and do not add anything.",
                                    "You remember the place of every object.",
                                    "You compare the notes before you answer.",
                                    "You help the team to finish on time."};
  std::vector<std::string> tasks = {"We are looking for a lost object.",
                                    "The team must open a locked room.",
                                    "Please prepare the report for tomorrow.",
                                    "There was an incident last night.",
                                    "The visitors arrive at noon.",
                                    "We need to find out who knows whom.",
                                    "The inventory has to be complete.",
                                    "Help the detective with the case."};
};

const Vocabulary& Vocab() {
  static const Vocabulary kVocabulary;
  return kVocabulary;
}

std::string Code(Random* random) {
  std::string code;
  for (int i = 0; i < 3; ++i) code += static_cast<char>('0' + random->Below(10));
  return code;
}

// A fact and the notes it rests on, the stating one last.
struct Fact {
  std::string value;
  std::vector<int> notes;
};

std::vector<int> Joined(const std::vector<int>& first, const std::vector<int>& second) {
  std::vector<int> all = first;
  for (int note : second) {
    if (std::find(all.begin(), all.end(), note) == all.end()) all.push_back(note);
  }
  return all;
}

struct Belonging {
  std::string object;
  std::string color;
  Fact place;
  int note = 0;
};

struct Person {
  std::string name;
  int note = 0;  // introduces the person
  std::optional<Fact> job, city, animal, trust;
  std::optional<Belonging> keeps;
  bool bound_job = false;
  bool bound_place = false;
  bool corrected_city = false;
};

struct Place {
  std::string name;
  Fact code;
  bool corrected = false;
};

// The facts so far; every method writes the next note's text and remembers what it says.
class Facts {
 public:
  explicit Facts(Random* random)
      : random_(random),
        objects_(random->Sample(Vocab().objects, Vocab().objects.size())),
        animals_(random->Sample(Vocab().animals, Vocab().animals.size())),
        places_(random->Sample(Vocab().places, Vocab().places.size())) {
    places_.resize(8);
  }

  const std::vector<std::string>& places() const { return places_; }
  const std::vector<Person>& people() const { return people_; }

  struct ProfileOptions {
    double bound_job = 0.45;
    double job = 0.9;
    double belonging = 0.8;
    double bound_place = 0.55;
    std::optional<std::size_t> peer;  // whom bound facts refer to; by chance if unset
  };
  std::string Profile(const std::string& name, int note, const ProfileOptions& chance) {
    Person p{.name = name, .note = note};
    std::string text;
    const Person* peer = Peer(chance.peer, [](const Person& q) { return q.job.has_value(); });
    if (peer != nullptr && random_->Chance(chance.bound_job)) {
      p.job = Fact{peer->job->value, Joined(peer->job->notes, {note})};
      p.bound_job = true;
      text = random_->Chance(0.5) ? name + " has the same job as " + peer->name + "."
                                  : name + " does what " + peer->name + " does for a living.";
    } else if (random_->Chance(chance.job)) {
      p.job = Fact{random_->Choice(Vocab().jobs), {note}};
      p.city = Fact{random_->Choice(Vocab().cities), {note}};
      text = random_->Chance(0.5) ? name + " is a " + p.job->value + " from " + p.city->value + "."
                                  : name + " comes from " + p.city->value + " and works as a " + p.job->value + ".";
    }
    const Person* keeper = Peer(chance.peer, [](const Person& q) { return q.keeps.has_value(); });
    if (!objects_.empty() && (text.empty() || random_->Chance(chance.belonging))) {
      Belonging b{.object = objects_.back(), .color = random_->Choice(Vocab().colors), .place = {}, .note = note};
      objects_.pop_back();
      const std::string thing = b.color + " " + b.object;
      if (!text.empty()) text += " ";
      if (keeper != nullptr && random_->Chance(chance.bound_place)) {
        b.place = Fact{keeper->keeps->place.value, Joined(keeper->keeps->place.notes, {note})};
        p.bound_place = true;
        const std::string& other = keeper->keeps->object;
        text += random_->Chance(0.5) ? name + " keeps the " + thing + " in the same place as the " + other + "."
                                     : "The " + thing + " of " + name + " lies next to the " + other + ".";
      } else {
        b.place = Fact{random_->Choice(places_), {note}};
        text += random_->Chance(0.5) ? name + " keeps the " + thing + " in the " + b.place.value + "."
                                     : "The " + thing + " of " + name + " is in the " + b.place.value + ".";
      }
      p.keeps = std::move(b);
    }
    people_.push_back(std::move(p));
    return text;
  }

  std::string PlaceCode(const std::string& name, int note) {
    codes_.push_back({.name = name, .code = {Code(random_), {note}}});
    const std::string& code = codes_.back().code.value;
    return random_->Chance(0.5) ? "The code of the " + name + " is " + code + "."
                                : "To open the " + name + " use " + code + ".";
  }

  // About the person introduced last; empty when there is nothing left to say.
  std::string Reference(int note, const std::vector<std::string>& all_people, double animal = 0.75,
                        double trust = 0.6) {
    Person& p = people_.back();
    std::string text;
    if (!p.animal && !animals_.empty() && random_->Chance(animal)) {
      p.animal = Fact{animals_.back(), {p.note, note}};
      animals_.pop_back();
      text = random_->Chance(0.5) ? "This person owns a " + p.animal->value + "."
                                  : "The same person has a " + p.animal->value + ".";
    }
    if (!p.trust && (text.empty() || random_->Chance(trust))) {
      std::vector<std::string> others = all_people;
      std::erase(others, p.name);
      p.trust = Fact{random_->Choice(others), {p.note, note}};
      if (!text.empty()) text += " ";
      text += random_->Chance(0.5) ? "This person trusts " + p.trust->value + "."
                                   : "The same person asked " + p.trust->value + " for help.";
    }
    return text;
  }

  std::string Correction(int note) {
    if (!codes_.empty() && random_->Chance(0.5)) {
      Place& last = codes_.back();
      last.code = Fact{Code(random_), Joined(last.code.notes, {note})};
      last.corrected = true;
      return "Correction: the last code was wrong. It is " + last.code.value + ".";
    }
    if (!people_.empty() && people_.back().city) {
      Person& p = people_.back();
      p.city = Fact{random_->Choice(Vocab().cities), Joined(p.city->notes, {note})};
      p.corrected_city = true;
      return "Correction: this person is from " + p.city->value + ".";
    }
    return "";
  }

  // Places where somebody keeps something and that have no code yet.
  std::vector<std::string> KeptWithin(const std::vector<std::string>& candidates) const {
    std::vector<std::string> kept;
    for (const Person& p : people_) {
      if (p.keeps && std::find(candidates.begin(), candidates.end(), p.keeps->place.value) != candidates.end())
        kept.push_back(p.keeps->place.value);
    }
    return kept;
  }

  std::vector<Question> Questions() const {
    std::vector<Question> q;
    for (const Person& p : people_) {
      if (p.job) {
        q.push_back(
            {p.bound_job ? "bound" : "one_hop", "What is the job of " + p.name + "?", p.job->value, p.job->notes});
      }
      if (p.city) {
        q.push_back(
            {p.corrected_city ? "override" : "one_hop", "Where is " + p.name + " from?", p.city->value, p.city->notes});
      }
      if (p.keeps) Belongings(p, &q);
      if (p.animal) {
        q.push_back({"coref", "Which animal does " + p.name + " own?", p.animal->value, p.animal->notes});
        q.push_back({"coref", "Who owns the " + p.animal->value + "?", p.name, p.animal->notes});
      }
      if (p.trust) q.push_back({"coref", "Whom does " + p.name + " trust?", p.trust->value, p.trust->notes});
    }
    for (const Place& place : codes_) {
      q.push_back({place.corrected ? "override" : "one_hop", "What is the code of the " + place.name + "?",
                   place.code.value, place.code.notes});
    }
    return q;
  }

 private:
  void Belongings(const Person& p, std::vector<Question>* q) const {
    const Belonging& b = *p.keeps;
    q->push_back({p.bound_place ? "bound" : "one_hop", "Where does " + p.name + " keep the " + b.object + "?",
                  b.place.value, b.place.notes});
    q->push_back({"one_hop", "What color is the " + b.object + " of " + p.name + "?", b.color, {b.note}});
    for (const Place& place : codes_) {
      if (place.name != b.place.value) continue;
      q->push_back({"two_hop", "What is the code of the place where " + p.name + " keeps the " + b.object + "?",
                    place.code.value, Joined(b.place.notes, place.code.notes)});
    }
  }

  template <typename Has>
  const Person* Peer(std::optional<std::size_t> chosen, Has has) {
    std::vector<std::size_t> able;
    for (std::size_t i = 0; i < people_.size(); ++i) {
      if (has(people_[i]) && (!chosen || *chosen == i)) able.push_back(i);
    }
    return able.empty() ? nullptr : &people_[random_->Choice(able)];
  }

  Random* random_;
  std::vector<std::string> objects_, animals_, places_;
  std::vector<Person> people_;  // in the order of their introduction
  std::vector<Place> codes_;
};

WorldSample Begin(const Reader& reader) { return {.agent = reader.agent, .role = reader.role, .task = reader.task}; }

// Appends notes as one message; the first note's author speaks.
void Speak(const std::vector<Note>& notes, std::size_t begin, std::size_t end, WorldSample* sample) {
  Message message{.author = notes[begin].author,
                  .text = {},
                  .first_note = static_cast<int>(begin),
                  .end_note = static_cast<int>(end)};
  for (std::size_t i = begin; i < end; ++i) message.text += (i > begin ? " " : "") + notes[i].text;
  sample->messages.push_back(std::move(message));
}

// Profiles that refer to nobody.
constexpr Facts::ProfileOptions kAlone{.bound_job = 0, .job = 1, .belonging = 1, .bound_place = 0};

}  // namespace

int WorldSample::MessageOf(int note) const {
  for (std::size_t m = 0; m < messages.size(); ++m) {
    if (note < messages[m].end_note) return static_cast<int>(m);
  }
  KVS_CHECK(false);
}

bool WorldSample::CrossesMessages(const Question& question) const {
  const int first = MessageOf(question.notes.front());
  return std::any_of(question.notes.begin(), question.notes.end(), [&](int n) { return MessageOf(n) != first; });
}

Reader MakeReader(Random* random) {
  Reader reader{.agent = random->Choice(Vocab().agents), .role = {}, .task = {}};
  for (const std::string& role : random->Sample(Vocab().roles, static_cast<std::size_t>(random->Between(1, 3)))) {
    reader.role += (reader.role.empty() ? "" : " ") + role;
  }
  reader.task = random->Choice(Vocab().tasks);
  return reader;
}

WorldSample MakeWorld(Random* random, const Reader& reader, int num_notes) {
  WorldSample sample = Begin(reader);
  const std::vector<std::string> people =
      random->Sample(Vocab().names, static_cast<std::size_t>(random->Between(2, 6)));
  std::vector<std::string> unmet = people;
  Facts facts(random);
  std::vector<std::string> uncoded = facts.places();
  std::vector<Note> notes;
  for (int i = 0; i < num_notes; ++i) {
    const int note = static_cast<int>(notes.size());
    const double roll = random->Unit();
    std::string text;
    if (!facts.people().empty() && roll < 0.30) {
      text = facts.Reference(note, people);
    } else if (!notes.empty() && roll < 0.42) {
      text = facts.Correction(note);
    } else if (!uncoded.empty() && roll < 0.68) {
      const std::vector<std::string> kept = facts.KeptWithin(uncoded);
      const std::string place = !kept.empty() && random->Chance(0.7) ? random->Choice(kept) : random->Choice(uncoded);
      std::erase(uncoded, place);
      text = facts.PlaceCode(place, note);
    }
    if (text.empty()) {
      if (!unmet.empty()) {
        text = facts.Profile(unmet.back(), note, {});
        unmet.pop_back();
      } else if (!uncoded.empty()) {
        text = facts.PlaceCode(uncoded.back(), note);
        uncoded.pop_back();
      } else {
        continue;
      }
    }
    notes.push_back({random->Choice(Vocab().agents), text});
  }
  static const std::vector<std::size_t> kNotesPerMessage = {1, 3, 4, 5, 6};
  for (std::size_t i = 0; i < notes.size();) {
    const std::size_t end = std::min(notes.size(), i + random->Choice(kNotesPerMessage));
    Speak(notes, i, end, &sample);
    i = end;
  }
  sample.questions = facts.Questions();
  random->Shuffle(&sample.questions);
  return sample;
}

WorldSample MakeRelay(Random* random, const Reader& reader, int hops) {
  WorldSample sample = Begin(reader);
  const std::vector<std::string> people = random->Sample(Vocab().names, static_cast<std::size_t>(hops) + 1);
  Facts facts(random);
  std::vector<Note> notes;
  std::vector<std::string> uncoded = facts.places();
  for (std::size_t i = 0; i < people.size(); ++i) {
    const std::size_t begin = notes.size();
    const std::string author = random->Choice(Vocab().agents);
    Facts::ProfileOptions next = kAlone;
    if (i > 0) next = {.bound_job = 1, .job = 1, .belonging = 1, .bound_place = 1, .peer = i - 1};
    notes.push_back({author, facts.Profile(people[i], static_cast<int>(notes.size()), next)});
    notes.push_back({author, facts.Reference(static_cast<int>(notes.size()), people, 1, 1)});
    notes.push_back({author, facts.PlaceCode(uncoded.back(), static_cast<int>(notes.size()))});
    uncoded.pop_back();
    Speak(notes, begin, notes.size(), &sample);
  }
  // The end of the chain, and the link before it.
  for (std::size_t i = people.size() - 1; i > 0 && i + 2 >= people.size(); --i) {
    const Person& p = facts.people()[i];
    sample.questions.push_back({"relay", "What is the job of " + p.name + "?", p.job->value, p.job->notes});
    sample.questions.push_back({"relay", "Where does " + p.name + " keep the " + p.keeps->object + "?",
                                p.keeps->place.value, p.keeps->place.notes});
  }
  random->Shuffle(&sample.questions);
  return sample;
}

WorldSample MakeCandidates(Random* random, const Reader& reader, int candidates) {
  WorldSample sample = Begin(reader);
  const std::vector<std::string> people = random->Sample(Vocab().names, static_cast<std::size_t>(candidates));
  Facts facts(random);
  std::vector<Note> notes;
  for (const std::string& name : people) {
    const std::size_t begin = notes.size();
    const std::string author = random->Choice(Vocab().agents);
    notes.push_back({author, facts.Profile(name, static_cast<int>(notes.size()), kAlone)});
    notes.push_back({author, facts.Reference(static_cast<int>(notes.size()), people, 1, 1)});
    Speak(notes, begin, notes.size(), &sample);
    const Fact& animal = *facts.people().back().animal;
    sample.questions.push_back({"judge", "Who owns the " + animal.value + "?", name, animal.notes});
  }
  random->Shuffle(&sample.questions);
  return sample;
}

WorldSample SwapOrder(const WorldSample& sample) {
  WorldSample swapped = sample;
  std::reverse(swapped.messages.begin(), swapped.messages.end());
  // Notes are numbered in reading order again.
  std::vector<int> number(static_cast<std::size_t>(sample.messages.back().end_note));
  int next = 0;
  for (Message& message : swapped.messages) {
    const int first = next;
    for (int note = message.first_note; note < message.end_note; ++note)
      number[static_cast<std::size_t>(note)] = next++;
    message.first_note = first;
    message.end_note = next;
  }
  for (Question& question : swapped.questions) {
    for (int& note : question.notes) note = number[static_cast<std::size_t>(note)];
  }
  return swapped;
}

WorldSample MakeControl(Random* random, const Reader& reader, int num_messages) {
  WorldSample sample = Begin(reader);
  const std::vector<std::string> people = random->Sample(Vocab().names, static_cast<std::size_t>(num_messages));
  Facts facts(random);
  std::vector<std::string> uncoded = facts.places();
  std::vector<Note> notes;
  for (const std::string& name : people) {
    const std::size_t begin = notes.size();
    const std::string author = random->Choice(Vocab().agents);
    notes.push_back({author, facts.Profile(name, static_cast<int>(notes.size()), kAlone)});
    for (int i = 0; i < 2; ++i) {
      notes.push_back({author, facts.PlaceCode(uncoded.back(), static_cast<int>(notes.size()))});
      uncoded.pop_back();
    }
    Speak(notes, begin, notes.size(), &sample);
  }
  for (Question& question : facts.Questions()) {
    if (question.kind != "one_hop") continue;  // a place both kept in and coded joins two notes
    question.kind = "control";
    sample.questions.push_back(std::move(question));
  }
  random->Shuffle(&sample.questions);
  return sample;
}

}  // namespace kvshare::quality
