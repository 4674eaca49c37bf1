// How the threads of an operator share its work: by OpenMP, or within a table of calls as a team that
// is formed once for all of them. A team's threads claim tasks, and none waits for a thread that does
// not run: on a workstation whose cores all compute, other programs take one away many times a second.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include <sched.h>

namespace {

using Clock = std::chrono::steady_clock;

// Others who wait for a core get it at one of these moments, not in the middle of a task.
constexpr auto REST_PERIOD = std::chrono::microseconds(150);
// A rest that took this long was a share for another program that computes: no rest for a while.
constexpr auto LONG_REST = std::chrono::milliseconds(2);
constexpr auto NO_REST = std::chrono::milliseconds(20);
constexpr int SPINS = 1000;  // of a thread that waits, before it rests

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Team {
  alignas(64) std::atomic<uint64_t> place{0};  // stage << 32 | first task that nobody has claimed
  alignas(64) std::atomic<int64_t> done{0};    // of the stage's tasks
};

// A thread of a team. All of them run the same code; what is not in a stage only reads.
class Member {
 public:
  explicit Member(Team& team) : team_(team) {}

  // The next stage: `body(first, end)` on claimed tasks, `share` at a time. Returns when all are done.
  template <class Body>
  void run(int64_t tasks, int64_t share, Body body) {
    if (tasks < 1) return;
    rest();
    const uint64_t stage = stage_++;
    int spins = 0;
    for (uint64_t place; (place = team_.place.load(std::memory_order_acquire)) >> 32 == stage;) {
      const int64_t first = place & 0xffffffff;
      if (first >= tasks) {
        wait(spins);
        continue;
      }
      const int64_t end = std::min(first + share, tasks);
      if (!team_.place.compare_exchange_weak(place, stage << 32 | end)) continue;
      body(first, end);
      if (team_.done.fetch_add(end - first) + end - first == tasks) {
        team_.done.store(0, std::memory_order_relaxed);
        team_.place.store((stage + 1) << 32, std::memory_order_release);
      }
    }
  }

 private:
  void rest() {
    const auto now = Clock::now();
    if (now < next_rest_) return;
    sched_yield();
    const auto after = Clock::now();
    next_rest_ = after + (after - now > LONG_REST ? Clock::duration(NO_REST) : REST_PERIOD);
  }

  void wait(int& spins) {
    relax();
    if (++spins % SPINS == 0) sched_yield();
  }

  Team& team_;
  uint64_t stage_ = 0;
  Clock::time_point next_rest_ = Clock::now();
};

// Who does an operator's work: a member of a team, or this many threads of OpenMP's.
struct Workers {
  int threads;
  Member* member = nullptr;

  // `body(first, end)` until all tasks are done, `share` at a time.
  template <class Body>
  void share_out(int64_t tasks, int64_t share, Body body) const {
    if (member) {
      member->run(tasks, share, body);
    } else if (threads < 2 || tasks <= share) {
      if (tasks > 0) body(0, tasks);
    } else {
      const int64_t shares = (tasks + share - 1) / share;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
      for (int64_t i = 0; i < shares; ++i) body(i * share, std::min((i + 1) * share, tasks));
    }
  }

  // What one thread does for all.
  template <class Body>
  void once(Body body) const {
    share_out(1, 1, [&](int64_t, int64_t) { body(); });
  }
};

}  // namespace
