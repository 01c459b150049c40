// What the bindings of every device check before anything changes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace deltamem_bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Apart from who requires it, so that what is written for an error does not lie in the way of who meets none.
template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
inline void require(bool fits, const Parts&... parts) {
  if (!fits) refuse(parts...);
}

// -1 stands for any size.
inline void check_shape(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  require(tensor.scalar_type() == dtype, name, ": wrong dtype (scalar type ", static_cast<int>(tensor.scalar_type()),
          ", expected ", static_cast<int>(dtype), ")");
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  if (fits)
    for (int64_t want : sizes) {
      fits = fits && (want < 0 || want == tensor.size(d));
      d++;
    }
  if (fits) return;
  std::ostringstream message;
  message << name << ": expected shape [";
  for (int64_t want : sizes) message << (want < 0 ? "any" : std::to_string(want)) << " ";
  message << "], got [";
  for (d = 0; d < tensor.dim(); d++) message << tensor.size(d) << " ";
  message << "]";
  throw std::runtime_error(message.str());
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

}  // namespace deltamem_bindings
