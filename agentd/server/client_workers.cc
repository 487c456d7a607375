#include "agentd/server/client_workers.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace kvshare::agentd {

struct ClientWorkers::State {
  struct Waiting {
    Job job;
    std::size_t bytes = 0;
  };
  struct Client {
    std::deque<Waiting> jobs;  // never empty
    std::size_t bytes = 0;     // of jobs
  };

  const std::function<void()> on_idle;
  std::mutex mu;  // guards what follows
  std::condition_variable changed;
  bool stopping = false;
  bool wake_when_idle = false;
  int running = 0;
  std::size_t bytes = 0;  // of all clients' jobs
  std::deque<Job> first;
  std::map<std::string, Client> clients;
  std::deque<std::string> turns;  // each of `clients` once; the next is in front
  std::vector<std::thread> threads;

  bool Empty() const { return first.empty() && turns.empty(); }

  void Run() {
    std::unique_lock lock(mu);
    while (true) {
      changed.wait(lock, [this] { return stopping || !Empty(); });
      if (stopping && first.empty()) return;
      ++running;
      {
        const Job job = Take();
        lock.unlock();
        job();
      }  // and what it holds has gone
      lock.lock();
      --running;
      if (wake_when_idle && Empty() && running == 0) on_idle();
    }
  }

  // Requires: mu held, not Empty().
  Job Take() {
    if (!first.empty()) {
      Job job = std::move(first.front());
      first.pop_front();
      return job;
    }
    const auto client = clients.find(turns.front());
    Waiting waiting = std::move(client->second.jobs.front());
    client->second.jobs.pop_front();
    client->second.bytes -= waiting.bytes;
    bytes -= waiting.bytes;
    if (client->second.jobs.empty()) {
      clients.erase(client);
    } else {
      turns.push_back(client->first);
    }
    turns.pop_front();
    return std::move(waiting.job);
  }
};

ClientWorkers::ClientWorkers(int threads, std::function<void()> on_idle)
    : state_(new State{.on_idle = std::move(on_idle)}) {
  for (int i = 0; i < threads; ++i) state_->threads.emplace_back([this] { state_->Run(); });
}

ClientWorkers::~ClientWorkers() {
  {
    const std::lock_guard lock(state_->mu);
    state_->stopping = true;
  }
  state_->changed.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

Status ClientWorkers::Submit(const std::string& client, std::size_t bytes, Job job) {
  {
    const std::size_t weight = bytes + kJobBytes;
    const std::lock_guard lock(state_->mu);
    const auto found = state_->clients.find(client);
    if ((found == state_->clients.end() ? 0 : found->second.bytes) + weight > kClientBytesMax) {
      return ResourceExhausted("too many requests of this client wait for an answer; wait for some first");
    }
    if (state_->bytes + weight > kBytesMax) {
      return ResourceExhausted("too many requests wait for an answer; ask again later");
    }
    State::Client& waiting = state_->clients[client];
    if (waiting.jobs.empty()) state_->turns.push_back(client);
    waiting.jobs.push_back({std::move(job), weight});
    waiting.bytes += weight;
    state_->bytes += weight;
  }
  state_->changed.notify_one();
  return OkStatus();
}

void ClientWorkers::SubmitFirst(Job job) {
  {
    const std::lock_guard lock(state_->mu);
    state_->first.push_back(std::move(job));
  }
  state_->changed.notify_one();
}

void ClientWorkers::Drop(const std::string& client) {
  std::deque<State::Waiting> dropped;  // destroyed without the lock
  const std::lock_guard lock(state_->mu);
  const auto found = state_->clients.find(client);
  if (found == state_->clients.end()) return;
  dropped = std::move(found->second.jobs);
  state_->bytes -= found->second.bytes;
  state_->clients.erase(found);
  state_->turns.erase(std::find(state_->turns.begin(), state_->turns.end(), client));
}

bool ClientWorkers::IdleOrWake() {
  const std::lock_guard lock(state_->mu);
  state_->wake_when_idle = true;
  return state_->Empty() && state_->running == 0;
}

}  // namespace kvshare::agentd
