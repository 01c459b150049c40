// Asking for memory before it is needed.
#pragma once

#include <cstdint>

namespace deltamem {
namespace {

// Every line that so many bytes touch; they need not begin where a line does.
inline void fetch(const void* first, int64_t bytes) {
  const char* byte = static_cast<const char*>(first);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(byte + i);
  __builtin_prefetch(byte + bytes - 1);
}

}  // namespace
}  // namespace deltamem
