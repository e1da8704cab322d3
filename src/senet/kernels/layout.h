// Descriptions of the structures and enumerations that Python shares, as structs.py has them: the
// loader compares the two one by one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace senet {

struct Field {
  const char *structure, *name;
  int64_t type;  // letter of Python's module struct: P pointer, q int64, d double; s anything else
  int64_t offset, size;
};

struct Constant {
  const char *enumeration, *name;
  int64_t value;
};

namespace {

template <class T>
constexpr int64_t type_letter() {
  if (std::is_pointer_v<T>) return 'P';
  if (std::is_same_v<T, int64_t>) return 'q';
  return std::is_same_v<T, double> ? 'd' : 's';
}

// Whether the fields lie one behind the other and fill a structure of `size` bytes: none is left out.
template <size_t kCount>
constexpr bool covers(const Field (&fields)[kCount], size_t size) {
  int64_t end = 0;
  for (const Field& field : fields) {
    if (field.offset != end) return false;
    end += field.size;
  }
  return end == int64_t(size);
}

}  // namespace
}  // namespace senet

#define SENET_FIELD(structure, name)                                             \
  senet::Field {                                                                 \
    #structure, #name, senet::type_letter<decltype(senet::structure::name)>(),   \
        int64_t(offsetof(senet::structure, name)), int64_t(sizeof(senet::structure::name)) \
  }
