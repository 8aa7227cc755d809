// The threads of a block as fibers: each runs until it waits for others. No order among threads, warps or blocks is
// promised, so each round of them draws another; EMULATION_SEED gives other ones.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <string>

#include <sys/mman.h>
#include <ucontext.h>

#include "cuda_runtime.h"

extern "C" {
extern uint64_t cuda_shared_begin[], cuda_shared_end[];  // from the linker
}

namespace emulation {

dim3 thread, block, threads, blocks;

namespace {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = (size_t(1) << 18) + 33 * 64;  // apart by no power of two: they would share lines of the cache

enum class State { ready, at_warp, at_block, done };

// The compiler's own: libc's would tell AddressSanitizer, at some expense, of stacks that are given up.
using Context = void*[5];
[[noreturn, gnu::noinline]] void jump(Context& to) { __builtin_longjmp(to, 1); }

struct Thread {
  Context resume;
  State state;
  Place place;
  int meetings;  // of its warp
};

struct Meeting {
  int arrived;
  Place place;
};

struct Warp {
  uint64_t values[2][kWarp];  // of this meeting and of the last one, which some lanes have yet to read
  Meeting meeting;
};

Thread all[kMostThreads];
Warp warps[kMostThreads / kWarp];
Meeting block_meeting;
int created = 0, alive;
bool met = true;  // Threads have met in the last block, as they do where they share memory.
Context scheduler;
const std::function<void()>* running;
std::string error;

[[gnu::noinline]] void yield() {
  if (!__builtin_setjmp(all[thread.x].resume)) jump(scheduler);
}

void release(int first, int count) {
  for (int t = first; t < first + count; ++t) {
    if (all[t].state != State::done) all[t].state = State::ready;
  }
}

void release_block_if_all_are_there() {
  if (block_meeting.arrived < alive) return;
  block_meeting.arrived = 0;
  release(0, static_cast<int>(threads.x));
}

std::string text(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

void arrive(Meeting& meeting, State state, Place place) {
  all[thread.x].state = state;
  all[thread.x].place = place;
  met = true;
  if (meeting.arrived++ == 0) meeting.place = place;
  if (place.line == meeting.place.line && place.file == meeting.place.file) return;
  fail(("thread " + std::to_string(thread.x) + " waits here, others at " + text(meeting.place)).c_str(), place);
}

void live() {
  for (;;) {
    yield();
    (*running)();
    all[thread.x].state = State::done;
    --alive;
    release_block_if_all_are_there();
  }
}

// Fibers outlive launches. One that an error has left in the middle of a kernel starts anew on its stack.
void create(int count) {
  static char* const stacks = static_cast<char*>(
      mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (; created < count; ++created) {
    thread.x = created;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + kStack * created;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, live, 0);
    if (!__builtin_setjmp(scheduler)) setcontext(&context);
  }
}

[[gnu::noinline]] void resume(int t) {
  thread.x = t;
  if (!__builtin_setjmp(scheduler)) jump(all[t].resume);
}

uint32_t draw() {
  static const char* const seed = std::getenv("EMULATION_SEED");
  static uint64_t state = (seed ? std::strtoull(seed, nullptr, 10) : 0) * 2 + 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

// The numbers below count in an order that is drawn.
template <typename Body>
void in_any_order(uint32_t count, Body body) {
  uint32_t size = 1;
  while (size < count) size *= 2;
  const uint32_t factor = draw() | 1, flips = draw();
  for (uint32_t i = 0; i < size; ++i) {
    const uint32_t number = (i * factor ^ flips) & (size - 1);
    if (number < count) body(number);
  }
}

// Runs the lanes of a warp until all wait for other warps, or are done; whether any has run.
bool run_warp(int first) {
  for (bool moved = false;; moved = true) {
    bool moves = false;
    in_any_order(kWarp, [&](uint32_t lane) {
      const int t = first + static_cast<int>(lane);
      if (all[t].state != State::ready || !error.empty()) return;
      moves = true;
      resume(t);
    });
    if (!moves) return moved;
  }
}

// Word by word, past AddressSanitizer, which has marked what lies between the arrays.
void spoil_shared_memory() {
  for (volatile uint64_t* word = cuda_shared_begin; word < cuda_shared_end; ++word) *word = ~uint64_t(0);
}

void run_block() {
  if (met) spoil_shared_memory();
  met = false;
  alive = static_cast<int>(threads.x);
  block_meeting.arrived = 0;
  for (int t = 0; t < alive; ++t) all[t].state = State::ready, all[t].meetings = 0;
  for (Warp& warp : warps) warp.meeting.arrived = 0;
  while (alive > 0) {
    bool moves = false;
    in_any_order(threads.x / kWarp, [&](uint32_t warp) { moves |= run_warp(static_cast<int>(warp) * kWarp); });
    if (!error.empty()) return;
    if (moves) continue;
    const auto waiting = std::find_if(all, all + threads.x, [](const Thread& t) { return t.state != State::done; });
    error = text(waiting->place) + ": thread " + std::to_string(waiting - all) + " waits for others in vain";
    return;
  }
}

}  // namespace

void fail(const char* what, Place place) {
  error = text(place) + ": " + what;
  jump(scheduler);
}

void meet_block(Place place) {
  arrive(block_meeting, State::at_block, place);
  release_block_if_all_are_there();
  yield();
}

const uint64_t* meet_warp(unsigned mask, uint64_t value, Place place) {
  if (mask != ~0u) fail("a part of a warp meets, which is not emulated", place);
  Warp& warp = warps[thread.x / kWarp];
  arrive(warp.meeting, State::at_warp, place);
  uint64_t* const values = warp.values[++all[thread.x].meetings % 2];
  values[thread.x % kWarp] = value;
  if (warp.meeting.arrived == kWarp) {
    warp.meeting.arrived = 0;
    release(static_cast<int>(thread.x) / kWarp * kWarp, kWarp);
  }
  yield();
  return values;
}

void launch(const std::function<void()>& kernel, uint32_t block_count, int thread_count) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  STD_TORCH_CHECK(thread_count % kWarp == 0 && thread_count <= kMostThreads, "threads of a block: ", thread_count);
  create(thread_count);
  running = &kernel;
  blocks.x = block_count;
  threads.x = static_cast<unsigned>(thread_count);
  error.clear();
  in_any_order(block_count, [&](uint32_t b) {
    block.x = b;
    if (error.empty()) run_block();
  });
  if (error.empty()) return;
  created = 0;
  STD_TORCH_CHECK(false, error);
}

}  // namespace emulation
