// The Python module ffr_ext._C. Importing it runs the static registrations of csrc/torch, which is what makes
// the native ops exist; build_info() says what was compiled, for `python -m ffr_ext info` and for the choice
// of a backend.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/rows/isa.h"

#define FFR_STRINGIZE_(x) #x
#define FFR_STRINGIZE(x) FFR_STRINGIZE_(x)

// The one function of libtorch_cuda that is used. Weak, so that a module with CUDA kernels loads next to a
// CPU torch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** ret_stream);

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// "2.10" from 0x020a...: the two topmost bytes are the major and the minor version.
std::string stable_abi() {
  constexpr uint64_t target = FFR_EXT_TORCH_TARGET;
  return std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["native"] = true;
  info["version"] = FFR_EXT_VERSION;
  info["compiler"] = compiler();
  info["torch_headers"] = FFR_EXT_TORCH_HEADERS;
  info["stable_abi"] = stable_abi();
  info["cpu_isa"] = ffr::cpu_isa_name();
#ifdef FFR_EXT_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = split(FFR_EXT_CUDA_ARCHS);
  info["nvcc"] = FFR_EXT_NVCC;
#else
  info["cuda"] = false;
  info["cuda_archs"] = split("");
  info["nvcc"] = pybind11::none();
#endif
  info["torch_has_cuda"] = &aoti_torch_get_current_cuda_stream != nullptr;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of ffr_ext; importing this module registers them as torch.ops.ffr_ext.*";
  m.def("build_info", &build_info,
        "What this module was compiled from and for: native, version, compiler, torch_headers, stable_abi "
        "(the oldest "
        "torch whose ABI it needs), cpu_isa (the code chosen on this machine), cuda, cuda_archs, nvcc, "
        "torch_has_cuda "
        "(whether libtorch_cuda was found when this module was loaded).");
}
