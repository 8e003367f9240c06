// The scheduler of cuda_emulation.h.

#include "cuda_emulation.h"

#include <sys/mman.h>

#include <exception>
#include <map>
#include <memory>
#include <sstream>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// There where the process runs under the address sanitizer, which is told of every change of stacks.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake, const void* bottom, std::size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, std::size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
}

#if defined(__x86_64__)
extern "C" void cuda_emulation_switch(void** save, void* load);
asm(R"(
.text
.hidden cuda_emulation_switch
.global cuda_emulation_switch
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
#endif

namespace cuda_emulation {

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kStaticShared = 48 * 1024;
constexpr int kResident = 3;        // blocks that are under way at a time
constexpr unsigned kLate = 24;      // passes that a warp is kept waiting, at most
constexpr int kIdlePasses = 10000;  // passes in which threads only sleep until they count as waiting for ever

// One stack of a fiber, or the stack that the scheduler runs on.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
void switch_to(Context& from, Context& to) { cuda_emulation_switch(&from.stack_pointer, to.stack_pointer); }
void prepare(Context& context, std::byte* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where a return from `entry` would go; the stack is as aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t own;
};
void switch_to(Context& from, Context& to) { swapcontext(&from.own, &to.own); }
void prepare(Context& context, std::byte* stack, void (*entry)()) {
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
  unsigned late = 0;  // passes that its threads are left out of
  Where where;
  const char* kind = "";
  std::byte values[2][kWarp * kBrought];  // of this meeting, and of the last, which slow lanes still read
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
thread_local Grid* grid = nullptr;

Grid& current() {
  if (grid == nullptr) fail("device code ran outside a launch");
  return *grid;
}

std::string text_of(const Where& where) {
  std::ostringstream text;
  text << where.function_name() << ", line " << where.line();
  return text.str();
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && a.function_name() == b.function_name();
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
  void give(Block& block) {
    for (Fiber& fiber : block.fibers) {
      // A thread that was given up in the middle leaves marks of its frames.
      if (fiber.state != State::ended && __asan_unpoison_memory_region != nullptr) {
        __asan_unpoison_memory_region(fiber.stack, kStackBytes);
      }
      free.push_back(fiber.stack);
    }
  }
};
thread_local Stacks stacks;

void to_scheduler(bool last = false) {
  Grid& own = *grid;
  void* fake = nullptr;
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, own.scheduler_stack, own.scheduler_stack_bytes);
  }
  switch_to(own.fiber->context, own.scheduler);
  if (__sanitizer_finish_switch_fiber != nullptr) __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void enter() {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(nullptr, &grid->scheduler_stack, &grid->scheduler_stack_bytes);
  }
  try {
    (*grid->body)();
  } catch (...) {
    grid->error = std::current_exception();
  }
  grid->fiber->state = State::ended;
  to_scheduler(true);
  std::abort();  // an ended fiber is not resumed
}

void resume(Grid& own, Fiber& fiber) {
  own.fiber = &fiber;
  void* fake = nullptr;
  if (__sanitizer_start_switch_fiber != nullptr) __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
  switch_to(own.scheduler, fiber.context);
  if (__sanitizer_finish_switch_fiber != nullptr) __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  if (own.error) std::rethrow_exception(own.error);
}

void release_barrier(Block& block) {
  if (block.waiting == 0 || block.waiting + block.ended < block.fibers.size()) return;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::barrier) fiber.state = State::ready;
  }
  block.waiting = 0;
}

struct Random {
  uint64_t state;
  unsigned operator()(std::size_t below) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>((state >> 33) % below);
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[(*this)(i)]);
  }
};

uint64_t seed() {
  const char* chosen = std::getenv("CUDA_EMULATION_SEED");
  return chosen == nullptr ? 1 : std::strtoull(chosen, nullptr, 10) + 1;
}

[[noreturn]] void stuck(const std::vector<std::unique_ptr<Block>>& blocks) {
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

std::unique_ptr<Block> begun(const Grid& own, uint64_t place) {
  auto block = std::make_unique<Block>();
  const dim3 blocks = own.blocks, threads = own.threads;
  const unsigned count = threads.x * threads.y * threads.z;
  block->index = {static_cast<unsigned>(place % blocks.x), static_cast<unsigned>(place / blocks.x % blocks.y),
                  static_cast<unsigned>(place / blocks.x / blocks.y)};
  block->fibers.resize(count);
  block->warps.resize((count + kWarp - 1) / kWarp);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = block->fibers[i];
    fiber.number = i;
    fiber.thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    fiber.stack = stacks.take();
    prepare(fiber.context, fiber.stack, &enter);
  }
  return block;
}

enum class Pass { worked, slept, stood };

// Resumes the threads of a block that can go on, once each. Some threads are left for the next pass, and now and then a
// warp for many of them, so that others run far ahead where nothing holds them.
Pass passed(Grid& own, Block& block, const std::vector<unsigned>& order, Random& random) {
  own.block = &block;
  Pass found = Pass::stood;
  for (Warp& warp : block.warps) warp.late -= warp.late > 0;
  if (random(8) == 0) block.warps[random(block.warps.size())].late = random(kLate);
  for (const unsigned i : order) {
    Fiber& fiber = block.fibers[i];
    if (fiber.state != State::ready && fiber.state != State::asleep) continue;
    if (fiber.state == State::ready && (block.warps[i / kWarp].late > 0 || random(8) == 0)) {
      found = Pass::worked;
      continue;
    }
    const bool slept = fiber.state == State::asleep;
    fiber.state = State::ready;
    resume(own, fiber);
    if (fiber.state == State::ended) {
      ++block.ended;
      release_barrier(block);
    }
    const bool sleeps = slept && fiber.state == State::asleep;
    if (!sleeps) {
      found = Pass::worked;
    } else if (found == Pass::stood) {
      found = Pass::slept;
    }
  }
  return found;
}

}  // namespace

void fail(const std::string& what) { throw std::runtime_error("CUDA emulation: " + what); }

const uint3& threadIdx() { return current().fiber->thread; }
const uint3& blockIdx() { return current().block->index; }
const dim3& blockDim() { return current().threads; }
const dim3& gridDim() { return current().blocks; }
unsigned number() { return current().fiber->number; }

void barrier(const Where& where) {
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

void sleep(const Where& where) {
  Grid& own = current();
  own.fiber->state = State::asleep;
  own.fiber->where = where;
  to_scheduler();
}

const std::byte* meet(unsigned mask, const void* value, std::size_t bytes, const char* kind, const Where& where) {
  Grid& own = current();
  Fiber& fiber = *own.fiber;
  Block& block = *own.block;
  const unsigned lane = fiber.number % kWarp, first = fiber.number - lane;
  Warp& warp = block.warps[fiber.number / kWarp];
  if (bytes > kBrought) fail(std::string(kind) + " brings too much");
  if (!(mask >> lane & 1u)) fail(std::string(kind) + " without the calling lane in its mask: " + text_of(where));
  if (warp.arrived == 0) {
    warp.expected = mask, warp.where = where, warp.kind = kind;
    for (unsigned other = 0; other < kWarp; ++other) {
      const bool there = first + other < block.fibers.size() && block.fibers[first + other].state != State::ended;
      if ((mask >> other & 1u) && !there) {
        fail(std::string(kind) + " waits for a lane that has ended or never was: " + text_of(where));
      }
    }
  } else if (warp.expected != mask || !same(warp.where, where)) {
    fail(std::string("lanes of a warp do different things: ") + warp.kind + " in " + text_of(warp.where) + ", and " +
         kind + " in " + text_of(where));
  }
  std::byte* values = warp.values[warp.generation % 2];
  std::memcpy(values + kBrought * lane, value, bytes);
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
  return values;
}

void* shared(const char* name, std::size_t bytes, const Where& where) {
  Block& block = *current().block;
  auto& found = block.shared[{where.function_name() + std::string(name), where.line()}];
  if (!found) {
    block.shared_bytes += bytes;
    if (block.shared_bytes > kStaticShared) fail("more than 48 KiB of shared memory: " + text_of(where));
    found.reset(new std::byte[bytes]);
    std::memset(found.get(), 0xff, bytes);
  }
  return found.get();
}

void run(dim3 blocks, dim3 threads, const std::function<void()>& body) {
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > 1024 || threads.z > 64) fail("a block of no threads, or of more than 1024");
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) fail("a grid of no blocks");
  if (blocks.x > 0x7fffffffu || blocks.y > 65535 || blocks.z > 65535) fail("a grid that is too large");
  if (grid != nullptr) fail("a launch within a launch");
  Grid own;
  own.blocks = blocks, own.threads = threads, own.body = &body;
  std::vector<std::unique_ptr<Block>> live;
  struct Ending {
    std::vector<std::unique_ptr<Block>>& live;
    ~Ending() {
      grid = nullptr;
      for (auto& block : live) stacks.give(*block);
    }
  } ending{live};
  grid = &own;
  Random random{seed()};
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  const uint64_t total = uint64_t{blocks.x} * blocks.y * blocks.z;
  int idle = 0;
  for (uint64_t next = 0; next < total || !live.empty();) {
    while (next < total && live.size() < kResident) live.push_back(begun(own, next++));
    random.shuffle(live);
    Pass whole = Pass::stood;
    for (auto& block : live) {
      random.shuffle(order);
      whole = std::min(whole, passed(own, *block, order, random));
    }
    idle = whole == Pass::worked ? 0 : idle + 1;
    if (whole == Pass::stood || idle > kIdlePasses) stuck(live);
    for (std::size_t i = live.size(); i-- > 0;) {
      if (live[i]->ended < count) continue;
      stacks.give(*live[i]);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
}

}  // namespace cuda_emulation
