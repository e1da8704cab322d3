// Runs kernels for remote_kernels.py, which sends the memory that they work on and has it back: so the
// tests' oracle judges a library of another processor, in an emulator.
//
//   remote_kernels LIBRARY   calls on standard input, answers on standard output
//
// A call: a function's name; one number, the type of the operators' functions (-1: they take none);
// the block of arguments; the numbers that follow it; regions of memory, each with its address' last
// bits; places in the block that hold addresses, as a region and an offset. The answer: a number, and
// the regions. Without a block the function takes nothing, and the answer has no regions.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int64_t kPage = 4096;

void get(void* to, size_t size) {
  if (std::fread(to, 1, size, stdin) != size) std::exit(0);
}
int64_t number() {
  int64_t value;
  get(&value, sizeof value);
  return value;
}
std::string text() {
  std::string value(size_t(number()), '\0');
  get(&value[0], value.size());
  return value;
}
void put(const void* from, size_t size) { std::fwrite(from, 1, size, stdout); }

// A page of room on each side, as vectors are read beyond the last number.
struct Region {
  std::vector<char> memory;
  char* begin;
  size_t size;
  Region() {
    size = size_t(number());
    const int64_t phase = number();
    memory.resize(size + 4 * size_t(kPage));
    const auto first = reinterpret_cast<uintptr_t>(memory.data());
    begin = memory.data() + (2 * kPage - int64_t(first % kPage) + phase);
    get(begin, size);
  }
};

template <class F>
F function(void* library, const std::string& name) {
  void* found = dlsym(library, name.c_str());
  if (!found) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(1);
  }
  return reinterpret_cast<F>(found);
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  for (;;) {
    const std::string name = text();
    const int64_t type = number();
    std::string block = text();
    std::vector<int64_t> numbers(static_cast<size_t>(number()));
    for (int64_t& value : numbers) value = number();
    std::vector<Region> regions(static_cast<size_t>(number()));
    const int64_t places = number();
    int64_t scratch = 0;
    for (int64_t i = 0; i < places; ++i) {
      const int64_t at = number(), region = number(), offset = number();
      const auto address = reinterpret_cast<int64_t>(regions[size_t(region)].begin + offset);
      if (at < 0)
        scratch = address;
      else
        std::memcpy(&block[size_t(at)], &address, sizeof address);
    }
    int64_t status = 0;
    if (block.empty()) {
      status = function<int64_t (*)()>(library, name)();
    } else if (name == "senet_run") {
      function<void (*)(void*, int64_t, int64_t, float*, int64_t)>(library, name)(
          &block[0], numbers[0], numbers[1], reinterpret_cast<float*>(scratch), numbers[2]);
    } else if (type < 0) {
      status = function<int (*)(const void*)>(library, name)(block.data());
    } else {
      status = function<int (*)(int, const void*)>(library, name)(int(type), block.data());
    }
    if (name == "senet_isa") {  // a name of up to eight letters
      const auto letters = reinterpret_cast<const char*>(status);
      status = 0;
      std::memcpy(&status, letters, strnlen(letters, sizeof status));
    }
    put(&status, sizeof status);
    for (const Region& region : regions) put(region.begin, region.size);
    std::fflush(stdout);
  }
}
