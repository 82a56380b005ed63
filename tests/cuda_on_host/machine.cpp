#include "machine.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>

#include "module.h"
#include "state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_host {

__thread Place place;
__thread Machine* running = nullptr;

namespace {

Machine& machine() {
  static thread_local std::unique_ptr<Machine> m;
  if (!m) m = std::make_unique<Machine>();
  return *m;
}

// AddressSanitizer must know of every switch.
void start_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom,
                  [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, bottom, bytes);
#endif
}
void finish_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** bottom = nullptr,
                   [[maybe_unused]] std::size_t* bytes = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, bottom, bytes);
#endif
}
void poison([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(p, bytes);
#endif
}
void unpoison([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, bytes);
#endif
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::uint64_t scramble(std::uint64_t z) {  // splitmix64's
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

std::uint32_t draw(Machine& m) { return scramble(m.random += 0x9e3779b97f4a7c15u) >> 32; }

// One of the bits that are set.
int draw_bit(Machine& m, unsigned bits) {
  const unsigned shift = draw(m) % 32;
  const unsigned turned = bits >> shift | bits << (32 - shift) % 32;
  return (__builtin_ctz(turned) + shift) % 32;
}

void make_ready(Machine& m, int warp, unsigned lanes) {
  m.warps[warp].ready |= lanes;
  if (lanes) m.ready_warps |= 1u << warp;
}

// The thread that goes on next: one of this warp while it can, so that caches stay warm. Null: none
// can.
Thread* next(Machine& m) {
  int warp = m.current ? m.current->warp : 0;
  if (!m.warps[warp].ready) {
    if (!m.ready_warps) return nullptr;
    warp = draw_bit(m, m.ready_warps);
  }
  const int lane = draw_bit(m, m.warps[warp].ready);
  m.warps[warp].ready &= ~(1u << lane);
  if (!m.warps[warp].ready) m.ready_warps &= ~(1u << warp);
  return &m.threads[warp * kLanes + lane];
}

void become(Machine& m, Thread& t) {
  m.current = &t;
  const unsigned x = place.block_dim.x, y = place.block_dim.y;
  place.thread = {t.id % x, t.id / x % y, t.id / (x * y)};
  t.started = true;
  m.shadow.enter(t);
}

void entry();

// Switches to a thread, from the current one (which leaves for good if from_fake is null) or from
// the main stack.
void go_to(Machine& m, Thread& t, void** from, void** from_fake) {
  if (!t.started) {
    t.stack = m.free_stacks[--m.free_count];
    t.stack_pointer = m.stacks.prepare(t.stack, entry);
    t.fake_stack = nullptr;
  }
  become(m, t);
  start_switch(from_fake, m.stacks.bottom(t.stack), Stacks::kStackBytes);
  cuda_on_host_switch(from, t.stack_pointer);
}

[[noreturn]] void leave(Machine& m) {
  void* unused;
  start_switch(nullptr, m.main_bottom, m.main_bytes);
  cuda_on_host_switch(&unused, m.main_stack_pointer);
  __builtin_unreachable();
}

// No thread can go on, though some have not finished.
[[noreturn]] void fail_stuck(Machine& m) {
  for (int w = 0; w * kLanes < m.thread_count; ++w) {
    Warp& warp = m.warps[w];
    if (!warp.groups) continue;
    const Group& g = warp.group[0];
    const int absent = __builtin_ctz(g.mask & ~g.arrived);
    become(m, m.threads[w * kLanes + __builtin_ctz(g.arrived)]);
    const Thread& other = m.threads[w * kLanes + absent];
    fail(g.site, "waits for the lanes of mask 0x%08x forever: %s waits elsewhere, at line %d",
         g.mask, thread_name(other.id), other.site.line);
  }
  fail(m.barrier_site, "waits forever");
}

void wait(Machine& m, Site site) {
  Thread& me = *m.current;
  me.site = site;
  Thread* t = next(m);
  if (t == &me) return;
  if (!t) fail_stuck(m);
  go_to(m, *t, &me.stack_pointer, &me.fake_stack);
  finish_switch(me.fake_stack);
}

void finish_thread(Machine& m) {
  Thread& me = *m.current;
  Warp& warp = m.warps[me.warp];
  const unsigned lane = 1u << me.lane;
  me.site = {"the kernel's end", 0};
  for (int i = 0; i < warp.groups; ++i) {
    const Group& g = warp.group[i];
    if (g.mask & lane) {
      fail(g.site, "has exited, yet mask 0x%08x, with which %s waits here, names it", g.mask,
           thread_name(me.warp * kLanes + __builtin_ctz(g.arrived)));
    }
  }
  if (m.at_barrier) {
    fail(m.barrier_site, "has exited, yet %s waits at this barrier", thread_name(m.barrier_first));
  }
  if (me.copy_count) fail(me.site, "asked for an asynchronous copy and never waited for it");
  warp.alive &= ~lane;
  ++m.finished;
}

// Where every stack begins. A thread that ends hands its stack to one that has not started: kernels
// without barriers never switch.
void entry() {
  Machine& m = *running;
  if (m.main_bottom) {
    finish_switch(nullptr);
  } else {
    finish_switch(nullptr, &m.main_bottom, &m.main_bytes);
  }
  for (;;) {
    m.body(m.parameters);
    finish_thread(m);
    const int stack = m.current->stack;
    Thread* t = next(m);
    if (!t && m.finished < m.thread_count) fail_stuck(m);
    if (!t || t->started) {
      m.free_stacks[m.free_count++] = stack;
      if (!t) leave(m);
      void* unused;
      go_to(m, *t, &unused, nullptr);
    }
    t->stack = stack;
    become(m, *t);
  }
}

void run_block(Machine& m) {
  const int warps = (m.thread_count + kLanes - 1) / kLanes;
  m.ready_warps = 0;
  m.finished = m.at_barrier = 0;
  m.steps = 0;
  for (int w = 0; w < warps; ++w) {
    const int lanes = m.thread_count - w * kLanes;
    m.warps[w].alive = lanes < kLanes ? (1u << lanes) - 1 : ~0u;
    m.warps[w].ready = m.warps[w].groups = 0;
    make_ready(m, w, m.warps[w].alive);
  }
  for (int id = 0; id < m.thread_count; ++id) {
    Thread& t = m.threads[id];
    t.id = id;
    t.warp = id / kLanes;
    t.lane = id % kLanes;
    t.started = false;
    t.groups = t.copy_count = 0;
  }
  for (int i = 0; i < m.object_count; ++i) {
    std::memset(m.arena + m.objects[i].begin, 0xff, m.objects[i].bytes);
  }
  m.shadow.begin_block(warps);
  m.current = nullptr;
  Thread* first = next(m);
  running = &m;
  go_to(m, *first, &m.main_stack_pointer, &m.main_fake_stack);
  finish_switch(m.main_fake_stack);
  running = nullptr;
  m.current = nullptr;
}

std::string source_line(Site site) {
  if (!site.address) {
    const char* name = std::strrchr(site.file, '/');
    std::string line = name ? name + 1 : site.file;
    if (site.line) line += ":" + std::to_string(site.line);
    return line;
  }
  Dl_info info{};
  if (!dladdr(site.address, &info) || !info.dli_fname) return "an unknown line";
  const auto offset = static_cast<const char*>(site.address) -
                      static_cast<const char*>(info.dli_fbase) - 1;  // in the call, not after it
  char command[1024], line[512] = "";
  std::snprintf(command, sizeof(command), "addr2line -e '%s' 0x%tx 2>/dev/null", info.dli_fname,
                offset);
  if (FILE* pipe = popen(command, "r")) {
    if (!std::fgets(line, sizeof(line), pipe)) line[0] = '\0';
    pclose(pipe);
  }
  line[std::strcspn(line, " \n")] = '\0';
  const char* name = std::strrchr(line, '/');
  return name ? name + 1 : "offset " + std::to_string(offset);
}

std::string triple(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

void check_limits(const std::string& kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes) {
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(kernel + ": no GPU runs " + what);
  };
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.z > 64 ||
      std::uint64_t{block.x} * block.y * block.z > kMaxThreads) {
    refuse("a block of " + triple({block.x, block.y, block.z}));
  }
  if (grid.x > 0x7fffffffu || grid.y > 0xffff || grid.z > 0xffff) {
    refuse("a grid of " + triple({grid.x, grid.y, grid.z}));
  }
  if (dynamic_bytes > kSharedBytes) {
    refuse(std::to_string(dynamic_bytes) + " bytes of shared memory (there are " +
           std::to_string(kSharedBytes) + ")");
  }
}

void* add_object(Machine& m, const void* key, std::size_t bytes, const char* signature) {
  if (m.object_count == kMaxObjects || m.arena_used + bytes + kMargin > kArenaBytes) {
    fail({"its shared memory", 0}, "has too many shared objects, or too large ones");
  }
  Object& object = m.objects[m.object_count++];
  object = {key, signature, m.arena_used, bytes};
  m.arena_used = (m.arena_used + bytes + kGap + 255) / 256 * 256;
  unpoison(m.arena + object.begin, bytes);
  std::memset(m.arena + object.begin, 0xff, bytes);
  return m.arena + object.begin;
}

const char kDynamic = 0;  // the key of dynamic shared memory

// The lanes of a mask meet; the last one calls finish() with what each of them gave.
void meet(void (*finish)(unsigned, void* const*), unsigned mask, void* data, Site site) {
  Machine& m = *running;
  Thread& me = *m.current;
  Warp& warp = m.warps[me.warp];
  const unsigned lane = 1u << me.lane;
  step(m, site);
  if (!(mask & lane)) fail(site, "gives mask 0x%08x, which does not name itself", mask);
  if (const unsigned absent = mask & ~warp.alive) {
    const int other = __builtin_ctz(absent);
    fail(site, "gives mask 0x%08x, which names lane %d, which %s", mask, other,
         me.warp * kLanes + other < m.thread_count ? "has exited" : "does not exist");
  }
  Group* g = warp.group;
  Group* const end = g + warp.groups;
  while (g != end && (g->mask != mask || g->finish != finish)) ++g;
  if (g == end) {
    ++warp.groups;
    g->finish = finish;
    g->mask = mask;
    g->arrived = 0;
    g->site = site;
  } else if (!same(g->site, site)) {
    fail(site, "comes to a warp operation with mask 0x%08x, while %s waits at another, at line %d",
         mask, thread_name(me.warp * kLanes + __builtin_ctz(g->arrived)), g->site.line);
  }
  g->arrived |= lane;
  g->data[me.lane] = data;
  if (g->arrived != mask) return wait(m, site);
  finish(mask, g->data);
  Group* const last = warp.group + --warp.groups;
  if (g != last) *g = *last;
  make_ready(m, me.warp, mask & ~lane);
}

}  // namespace

Machine::Machine() {
  void* p = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  arena = static_cast<char*>(p);
  poison(arena, kArenaBytes);
}

Machine::~Machine() {
  unpoison(arena, kArenaBytes);
  munmap(arena, kArenaBytes);
}

const char* thread_name(int id) {
  static __thread char names[4][64];
  static __thread int turn;
  char* name = names[turn = (turn + 1) % 4];
  const unsigned x = place.block_dim.x, y = place.block_dim.y, n = id;
  std::snprintf(name, sizeof(names[0]), "thread (%u, %u, %u)", n % x, n / x % y, n / (x * y));
  return name;
}

void fail(const Site& site, const char* format, ...) {
  Machine& m = *running;
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(m.error, sizeof(m.error), format, arguments);
  va_end(arguments);
  m.error_site = site;
  leave(m);
}

void* parameters(std::size_t bytes) {
  if (bytes > 4096) throw std::runtime_error("a kernel has more than 4096 bytes of parameters");
  return machine().stacks.bottom(kMaxThreads);
}

void run(const std::string& kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes,
         void (*body)(const void*), const void* given) {
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (blocks == 0) return;
  check_limits(kernel, grid, block, dynamic_bytes);
  Machine& m = machine();
  m.body = body;
  m.parameters = given;
  m.thread_count = static_cast<int>(block.x * block.y * block.z);
  m.seed = m.random = seed();
  m.bytes[0] = m.bytes[1] = 0;
  m.object_count = 0;
  m.arena_used = kMargin;
  m.error[0] = '\0';
  m.free_count = 0;
  m.main_bottom = nullptr;
  for (int i = m.thread_count; i-- > 0;) m.free_stacks[m.free_count++] = i;
  place.block_dim = {block.x, block.y, block.z};
  place.grid_dim = {grid.x, grid.y, grid.z};
  add_object(m, &kDynamic, dynamic_bytes, "T = dynamic memory]");
  // Every block once, from anywhere on and in steps that have no divisor in common with their
  // number.
  std::uint64_t stride = 1 + draw(m) % blocks;
  while (std::gcd(stride, blocks) != 1) --stride;
  std::uint64_t index = draw(m) % blocks;
  for (std::uint64_t i = 0; i < blocks && !m.error[0]; ++i, index = (index + stride) % blocks) {
    place.block = {static_cast<unsigned>(index % grid.x),
                   static_cast<unsigned>(index / grid.x % grid.y),
                   static_cast<unsigned>(index / grid.x / grid.y)};
    run_block(m);
  }
  for (int i = 0; i < m.object_count; ++i) {
    poison(m.arena + m.objects[i].begin, m.objects[i].bytes);
  }
  if (!m.error[0]) return record(kernel, m.bytes[0], m.bytes[1]);
  for (int i = 0; i < m.thread_count; ++i) m.stacks.forget(i);
  m.shadow.forget();
  throw std::runtime_error(kernel + ", block " + triple(place.block) + ", thread " +
                           triple(place.thread) + ", " + source_line(m.error_site) + ": " +
                           m.error + " (seed " + std::to_string(m.seed) + ")");
}

void* shared_object(const void* key, std::size_t bytes, const char* signature) {
  Machine& m = *running;
  std::size_t total = 0;
  for (int i = 0; i < m.object_count; ++i) {
    if (m.objects[i].key == key) return m.arena + m.objects[i].begin;
    total += m.objects[i].bytes;
  }
  const std::size_t dynamic = m.objects[0].bytes;
  if (total - dynamic + bytes > kStaticBytes || total + bytes > kSharedBytes) {
    fail({"its shared memory", 0}, "has %zu bytes of static and %zu of dynamic shared memory",
         total - dynamic + bytes, dynamic);
  }
  return add_object(m, key, bytes, signature);
}

void* dynamic_shared() { return running->arena + running->objects[0].begin; }

void barrier(Site site) {
  Machine& m = *running;
  Thread& me = *m.current;
  step(m, site);
  if (m.finished) {
    for (int id = 0; id < m.thread_count; ++id) {
      const Thread& t = m.threads[id];
      if (!(m.warps[t.warp].alive >> t.lane & 1)) {
        fail(site, "comes to a barrier that %s has exited before", thread_name(id));
      }
    }
  }
  if (m.at_barrier == 0) {
    m.barrier_site = site;
    m.barrier_first = me.id;
  } else if (!same(m.barrier_site, site)) {
    fail(site, "comes to a barrier while %s waits at another, at line %d: they diverged",
         thread_name(m.barrier_first), m.barrier_site.line);
  }
  if (++m.at_barrier < m.thread_count) return wait(m, site);
  m.at_barrier = 0;
  m.shadow.order_block();
  for (int w = 0; w * kLanes < m.thread_count; ++w) make_ready(m, w, m.warps[w].alive);
  // The last to come must wait for its turn like the others: who goes on first is drawn.
  wait(m, site);
  m.shadow.enter(me);
}

void sync_warp(unsigned mask, Site site) {
  Thread& me = *running->current;
  meet(
      [](unsigned mask, void* const* data) {
        const auto* one = static_cast<const Thread*>(data[__builtin_ctz(mask)]);
        running->shadow.order_warp(one->warp, mask);
      },
      mask, &me, site);
  running->shadow.enter(me);
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  unsigned vote = predicate;
  meet(
      [](unsigned mask, void* const* data) {
        unsigned votes = 0;
        for (int lane = 0; lane < kLanes; ++lane) {
          if (mask >> lane & 1) votes |= *static_cast<unsigned*>(data[lane]) << lane;
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          if (mask >> lane & 1) *static_cast<unsigned*>(data[lane]) = votes;
        }
      },
      mask, &vote, site);
  return vote;
}

std::uint64_t shuffle(Move move, unsigned mask, std::uint64_t value, int operand, int width,
                      Site site) {
  struct Offer {
    std::uint64_t value, result;
    int source;
  };
  const int lane = running->current->lane;
  if (width < 1 || width > kLanes || (width & (width - 1))) {
    fail(site, "shuffles in a width of %d, which is no power of 2 up to 32", width);
  }
  const int first = lane & ~(width - 1), last = first + width - 1;
  int source = lane;
  switch (move) {
    case Move::kIndex:
      source = first | (operand & (width - 1));
      break;
    case Move::kXor:
      source = lane ^ operand;
      break;
    case Move::kDown:
      source = lane + operand;
      break;
    case Move::kUp:
      source = lane - operand;
      break;
  }
  // As the hardware: what lies outside the lane's part of the warp gives the lane's own value.
  if (source > last || (move == Move::kUp && source < first)) source = lane;
  if (!(mask >> source & 1)) {
    fail(site, "reads lane %d, which is not in mask 0x%08x", source, mask);
  }
  Offer offer{value, 0, source};
  meet(
      [](unsigned mask, void* const* data) {
        for (unsigned left = mask; left; left &= left - 1) {
          auto* to = static_cast<Offer*>(data[__builtin_ctz(left)]);
          to->result = static_cast<const Offer*>(data[to->source])->value;
        }
      },
      mask, &offer, site);
  return offer.result;
}

namespace {

void check_shared_row(const Machine& m, const void* row, Site site) {
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(row) - m.arena);
  if (!object_at(m, offset, 16)) fail(site, "gives an address outside of shared memory");
  if (offset % 16 != 0) fail(site, "gives an address of shared memory that is no multiple of 16");
}

struct MatrixRow {
  const void* row;
  std::uint32_t* r;
};

template <bool kTransposed>
void finish_matrices(unsigned, void* const* data) {
  for (int lane = 0; lane < kLanes; ++lane) {
    std::uint32_t* r = static_cast<MatrixRow*>(data[lane])->r;
    const int major = lane / 4, minor = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      std::uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int row = kTransposed ? minor + j : major, column = kTransposed ? major : minor + j;
        pair[j] = static_cast<const std::uint16_t*>(
            static_cast<MatrixRow*>(data[8 * i + row])->row)[column];
      }
      std::memcpy(&r[i], pair, sizeof(r[i]));
    }
  }
}

struct Fragments {
  float* c;
  const std::uint32_t *a, *b;
};

template <Half kHalf>
float number(std::uint32_t pair, int high) {
  const auto bits = static_cast<std::uint16_t>(pair >> 16 * high);
  if constexpr (kHalf == Half::kBf16) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float v;
    std::memcpy(&v, &wide, sizeof(v));
    return v;
  } else {
    Float16 v;
    std::memcpy(&v, &bits, sizeof(v));
    return static_cast<float>(v);
  }
}

// The lanes' parts are those that device_nvcc.h describes.
template <Half kHalf>
void finish_product(unsigned, void* const* data) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(data[lane]);
    const int g = lane / 4, q = lane % 4 * 2;
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][q + i / 2 * 8 + j] = number<kHalf>(f.a[i], j);
      for (int i = 0; i < 2; ++i) b[q + i * 8 + j][g] = number<kHalf>(f.b[i], j);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* c = static_cast<Fragments*>(data[lane])->c;
    const int g = lane / 4, q = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const float* row = a[g + i / 2 * 8];
      for (int k = 0; k < 16; ++k) c[i] += row[k] * b[k][q + i % 2];
    }
  }
}

}  // namespace

void load_matrices(std::uint32_t* r, const void* shared_row, bool transposed, Site site) {
  Machine& m = *running;
  check_shared_row(m, shared_row, site);
  m.shadow.access(m, Access::kRead, static_cast<const char*>(shared_row) - m.arena, 16, site);
  MatrixRow row{shared_row, r};
  meet(transposed ? finish_matrices<true> : finish_matrices<false>, ~0u, &row, site);
}

void multiply_tiles(Half half, float* c, const std::uint32_t* a, const std::uint32_t* b,
                    Site site) {
  Fragments fragments{c, a, b};
  meet(half == Half::kBf16 ? finish_product<Half::kBf16> : finish_product<Half::kF16>, ~0u,
       &fragments, site);
}

// The bytes are copied at the wait, as late as a GPU may.
void copy_async(void* shared_to, const void* global_from, bool valid, Site site) {
  Machine& m = *running;
  step(m, site);
  check_shared_row(m, shared_to, site);
  if (valid && reinterpret_cast<std::uintptr_t>(global_from) % 16 != 0) {
    fail(site, "copies from an address that is no multiple of 16");
  }
  Thread& me = *m.current;
  if (me.copy_count == kMaxCopies) {
    fail(site, "has more than %d asynchronous copies under way", kMaxCopies);
  }
  auto* to = static_cast<char*>(shared_to);
  m.shadow.begin_copy(m, to - m.arena, 16, site);
  std::memset(to, 0xff, 16);
  if (valid) m.bytes[0] += 16;
  m.copies[me.id][me.copy_count++] = {to, valid ? global_from : nullptr, me.groups};
}

void commit_copies() { ++running->current->groups; }

void wait_for_copies(int pending, Site site) {
  Machine& m = *running;
  Thread& me = *m.current;
  step(m, site);
  int kept = 0;
  for (int i = 0; i < me.copy_count; ++i) {
    const Copy copy = m.copies[me.id][i];
    if (copy.group >= me.groups - pending) {
      m.copies[me.id][kept++] = copy;
      continue;
    }
    if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
    m.shadow.end_copy(copy.to - m.arena, 16);
  }
  me.copy_count = kept;
}

}  // namespace cuda_on_host
