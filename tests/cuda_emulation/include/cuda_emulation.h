// CUDA's threads on one thread of the CPU, for the logic of kernels and not for their speed.
//
// Every thread of a block is a fiber that runs until it waits for others. The order in which waiting fibers go on is
// shuffled, so that what depends on an order that nothing guarantees comes out wrong. Several blocks are under way at a
// time, admitted in the order of their indices. Found here and silent or fatal on a GPU: barriers that some threads do
// not reach, or reach at another place; shuffles that name lanes that have ended or do something else; waiting for ever;
// shared memory that is read before it is written (it begins as NaN); launches that a GPU refuses. Compiled with
// sanitizers also every access outside shared and global memory, and vectors that are not aligned.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

namespace cuda_emulation {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr unsigned kWarp = 32;
constexpr std::size_t kStaticShared = 48 * 1024;
constexpr int kResident = 3;        // blocks that are under way at a time
constexpr int kIdlePasses = 10000;  // passes in which threads only sleep until they count as waiting for ever

using Where = std::source_location;

inline std::string text_of(const Where& where) {
  std::ostringstream text;
  text << where.function_name() << ", line " << where.line();
  return text.str();
}

inline bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.function_name(), b.function_name()) == 0;
}

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("CUDA emulation: " + what); }

// One stack of a fiber, or the stack that the scheduler runs on. ---------------------------------------------------------
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void cuda_emulation_switch(void** save, void* load);
asm(R"(
.text
.weak cuda_emulation_switch
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, .-cuda_emulation_switch
)");
inline void switch_to(Context& from, Context& to) { cuda_emulation_switch(&from.stack_pointer, to.stack_pointer); }
inline void prepare(Context& context, std::byte* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
  *--top = nullptr;  // where a return from `entry` would go; also makes the stack as aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t own;
};
inline void switch_to(Context& from, Context& to) { swapcontext(&from.own, &to.own); }
inline void prepare(Context& context, std::byte* stack, void (*entry)()) {
  getcontext(&context.own);
  context.own.uc_stack.ss_sp = stack;
  context.own.uc_stack.ss_size = kStackBytes;
  context.own.uc_link = nullptr;
  makecontext(&context.own, entry, 0);
}
#endif

enum class State { ready, barrier, warp, asleep, ended };

struct Fiber {
  Context context;
  std::byte* stack = nullptr;
  uint3 thread;
  unsigned number = 0;
  State state = State::ready;
  Where where;
};

struct Warp {
  unsigned arrived = 0, expected = 0, generation = 0;
  Where where;
  std::string kind;
  alignas(16) std::byte values[2][kWarp][16];
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned waiting = 0, ended = 0;
  Where barrier;
  std::map<std::pair<std::string, unsigned>, std::unique_ptr<std::byte[]>> shared;
  std::size_t shared_bytes = 0;
};

// What runs on this thread of the CPU.
struct Grid {
  dim3 blocks, threads;
  const std::function<void()>* body = nullptr;
  Block* block = nullptr;
  Fiber* fiber = nullptr;
  Context scheduler;
  std::exception_ptr error;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
};
inline thread_local Grid* grid = nullptr;

inline Grid& current() {
  if (grid == nullptr) fail("device code ran outside a launch");
  return *grid;
}

// Stacks are kept for the next launch of the same thread of the CPU.
struct Stacks {
  std::vector<std::byte*> free;
  ~Stacks() {
    for (std::byte* stack : free) munmap(stack, kStackBytes);
  }
  std::byte* take() {
    if (free.empty()) {
      void* fresh = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (fresh == MAP_FAILED) fail("no memory for the stack of a thread");
      return static_cast<std::byte*>(fresh);
    }
    std::byte* last = free.back();
    free.pop_back();
    return last;
  }
  void give(std::byte* stack) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);
#endif
    free.push_back(stack);
  }
};
inline thread_local Stacks stacks;

inline void to_scheduler(bool last = false) {
  Grid& own = current();
  Fiber& fiber = *own.fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, own.scheduler_stack, own.scheduler_stack_bytes);
#endif
  switch_to(fiber.context, own.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &grid->scheduler_stack, &grid->scheduler_stack_bytes);
#endif
  try {
    (*grid->body)();
  } catch (...) {
    grid->error = std::current_exception();
  }
  grid->fiber->state = State::ended;
  to_scheduler(true);
  std::abort();  // an ended fiber is not resumed
}

inline void resume(Grid& own, Fiber& fiber) {
  own.fiber = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
#endif
  switch_to(own.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  if (own.error) std::rethrow_exception(own.error);
}

inline void release_barrier(Block& block) {
  if (block.waiting == 0 || block.waiting + block.ended < block.fibers.size()) return;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::barrier) fiber.state = State::ready;
  }
  block.waiting = 0;
}

inline void barrier(const Where& where) {
  Grid& own = current();
  Block& block = *own.block;
  if (block.waiting > 0 && !same(block.barrier, where)) {
    fail("threads of a block are at different barriers: " + text_of(block.barrier) + " and " + text_of(where));
  }
  block.barrier = where;
  ++block.waiting;
  own.fiber->state = State::barrier;
  own.fiber->where = where;
  release_barrier(block);
  if (own.fiber->state == State::barrier) to_scheduler();
}

// Waits for the lanes of the mask and gives what each of them brought.
template <class T>
const std::byte (*meet(unsigned mask, const T& value, const char* kind, const Where& where))[16] {
  static_assert(sizeof(T) <= 16);
  Grid& own = current();
  Fiber& fiber = *own.fiber;
  Block& block = *own.block;
  const unsigned lane = fiber.number % kWarp, first = fiber.number - lane;
  Warp& warp = block.warps[fiber.number / kWarp];
  if (!(mask >> lane & 1u)) fail(std::string(kind) + " without the calling lane in its mask: " + text_of(where));
  if (warp.arrived == 0) {
    warp.expected = mask, warp.where = where, warp.kind = kind;
  } else if (warp.expected != mask || !same(warp.where, where) || warp.kind != kind) {
    fail("lanes of a warp do different things: " + warp.kind + " in " + text_of(warp.where) + ", and " + kind + " in " +
         text_of(where));
  }
  for (unsigned other = 0; other < kWarp; ++other) {
    const bool there = first + other < block.fibers.size() && block.fibers[first + other].state != State::ended;
    if ((mask >> other & 1u) && !there) {
      fail(std::string(kind) + " waits for a lane that has ended or never was: " + text_of(where));
    }
  }
  const unsigned generation = warp.generation;
  std::memcpy(warp.values[generation % 2][lane], &value, sizeof(T));
  warp.arrived |= 1u << lane;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
    for (unsigned other = 0; other < kWarp && first + other < block.fibers.size(); ++other) {
      Fiber& each = block.fibers[first + other];
      if ((mask >> other & 1u) && each.state == State::warp) each.state = State::ready;
    }
  } else {
    fiber.state = State::warp;
    fiber.where = where;
    to_scheduler();
  }
  return warp.values[generation % 2];
}

template <class T>
T from_lane(unsigned mask, const T& value, unsigned source, const char* kind, const Where& where) {
  const auto* values = meet(mask, value, kind, where);
  T found;
  std::memset(&found, 0xff, sizeof found);  // a lane that takes no part gives anything
  if (source < kWarp && (mask >> source & 1u)) std::memcpy(&found, values[source], sizeof found);
  return found;
}

inline void sleep(const Where& where) {
  Grid& own = current();
  own.fiber->state = State::asleep;
  own.fiber->where = where;
  to_scheduler();
}

// The block's own array for one declaration.
template <class T>
T* shared(const char* name, const Where& where) {
  Block& block = *current().block;
  auto& found = block.shared[{where.function_name() + std::string(name), where.line()}];
  if (!found) {
    block.shared_bytes += sizeof(T);
    if (block.shared_bytes > kStaticShared) fail("more than 48 KiB of shared memory: " + text_of(where));
    found.reset(new std::byte[sizeof(T)]);
    std::memset(found.get(), 0xff, sizeof(T));
  }
  return reinterpret_cast<T*>(found.get());
}

inline uint64_t seed() {
  const char* chosen = std::getenv("CUDA_EMULATION_SEED");
  return chosen == nullptr ? 1 : std::strtoull(chosen, nullptr, 10) + 1;
}

struct Random {
  uint64_t state;
  unsigned operator()(unsigned below) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>((state >> 33) % below);
  }
};

[[noreturn]] inline void stuck(const std::vector<std::unique_ptr<Block>>& blocks) {
  for (const auto& block : blocks) {
    for (const Fiber& fiber : block->fibers) {
      if (fiber.state == State::ended) continue;
      const char* at = fiber.state == State::barrier ? "the barrier" : fiber.state == State::warp ? "a lane" : "a value";
      std::ostringstream text;
      text << "deadlock: thread " << fiber.number << " of block " << block->index.x << ", " << block->index.y << ", "
           << block->index.z << " waits for ever for " << at << " in " << text_of(fiber.where);
      fail(text.str());
    }
  }
  fail("deadlock");
}

inline void run(dim3 blocks, dim3 threads, const std::function<void()>& body) {
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > 1024 || threads.z > 64) fail("a block of no threads, or of more than 1024");
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) fail("a grid of no blocks");
  if (blocks.x > 0x7fffffffu || blocks.y > 65535 || blocks.z > 65535) fail("a grid that is too large");
  if (grid != nullptr) fail("a launch within a launch");
  Grid own;
  own.blocks = blocks, own.threads = threads, own.body = &body;
  struct Reset {
    ~Reset() { grid = nullptr; }
  } reset;
  grid = &own;
  Random random{seed()};
  std::vector<std::unique_ptr<Block>> live;
  struct Return {
    std::vector<std::unique_ptr<Block>>& live;
    ~Return() {
      for (auto& block : live) {
        for (Fiber& fiber : block->fibers) stacks.give(fiber.stack);
      }
    }
  } give_back{live};
  const uint64_t total = uint64_t{blocks.x} * blocks.y * blocks.z;
  uint64_t next = 0;
  int idle = 0;
  std::vector<unsigned> order(count);
  while (next < total || !live.empty()) {
    while (next < total && live.size() < kResident) {
      auto block = std::make_unique<Block>();
      block->index = {static_cast<unsigned>(next % blocks.x), static_cast<unsigned>(next / blocks.x % blocks.y),
                      static_cast<unsigned>(next / blocks.x / blocks.y)};
      block->fibers.resize(count);
      block->warps.resize((count + kWarp - 1) / kWarp);
      for (unsigned i = 0; i < count; ++i) {
        Fiber& fiber = block->fibers[i];
        fiber.number = i;
        fiber.thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
        fiber.stack = stacks.take();
        prepare(fiber.context, fiber.stack, &enter);
      }
      live.push_back(std::move(block));
      ++next;
    }
    for (std::size_t i = live.size(); i > 1; --i) std::swap(live[i - 1], live[random(static_cast<unsigned>(i))]);
    bool progress = false, sleepers = false;
    for (auto& block : live) {
      own.block = block.get();
      for (unsigned i = 0; i < count; ++i) order[i] = i;
      for (unsigned i = static_cast<unsigned>(count); i > 1; --i) std::swap(order[i - 1], order[random(i)]);
      for (const unsigned i : order) {
        Fiber& fiber = block->fibers[i];
        if (fiber.state == State::asleep) {
          sleepers = true;
        } else if (fiber.state != State::ready) {
          continue;
        } else {
          progress = true;
        }
        fiber.state = State::ready;
        resume(own, fiber);
        if (fiber.state == State::ended) {
          progress = true;
          ++block->ended;
          release_barrier(*block);
        } else if (fiber.state != State::asleep) {
          progress = true;
        }
      }
    }
    idle = progress ? 0 : idle + 1;
    if (!progress && (!sleepers || idle > kIdlePasses)) stuck(live);
    for (std::size_t i = live.size(); i-- > 0;) {
      if (live[i]->ended < count) continue;
      for (Fiber& fiber : live[i]->fibers) stacks.give(fiber.stack);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
}

// What `kernel<<<blocks, threads, shared, stream>>>(...)` becomes.
class Launch {
 public:
  Launch(dim3 blocks, dim3 threads, std::size_t shared = 0, void* = nullptr) : blocks_(blocks), threads_(threads) {
    if (shared != 0) fail("dynamic shared memory is not emulated");
  }
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments&&... arguments) const {
    const std::tuple<std::decay_t<Parameters>...> kept(std::forward<Arguments>(arguments)...);
    run(blocks_, threads_, [&] { std::apply(kernel, kept); });
  }

 private:
  dim3 blocks_, threads_;
};

}  // namespace cuda_emulation
