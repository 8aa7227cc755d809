// Threads that work through phases of shares together, in one parallel region.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "common/parallel.h"

namespace paper_layers {

// Calls body(each) on up to `threads` threads. In it, each(count, share) is a phase: share(i) is called for 0 .. count,
// by whichever thread is free, and each() returns when all are done. Every thread meets the same phases, `phases` at
// most. The work gets done however few threads come, and however late.
class Team {
 public:
  class Each {
   public:
    explicit Each(Team& team) : team_(team) {}

    template <typename Share>
    void operator()(int64_t count, const Share& share) {
      Phase& phase = team_.phases_[phase_++];
      for (int64_t i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        try {
          if (!team_.failed_.load(std::memory_order_relaxed)) share(i);
        } catch (...) {
          team_.fail();
        }
        phase.done.fetch_add(1, std::memory_order_release);
      }
      for (int64_t look = 0; phase.done.load(std::memory_order_acquire) < count; ++look) {
        if (look > 64) std::this_thread::yield();
      }
    }

   private:
    Team& team_;
    int64_t phase_ = 0;
  };

  template <typename Body>
  static void run(int64_t threads, int64_t phases, const Body& body) {
    Team team(phases);
    parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(Each(team)); });
    if (team.error_) std::rethrow_exception(team.error_);
  }

 private:
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
  };

  explicit Team(int64_t phases) : phases_(new Phase[phases]) {}

  void fail() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    failed_ = true;
  }

  std::unique_ptr<Phase[]> phases_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  std::mutex mutex_;
};

}  // namespace paper_layers
