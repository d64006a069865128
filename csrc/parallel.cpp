#include "parallel.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <string>
#endif

namespace airl_fast {

#if defined(__linux__)
namespace {

// Keeps the path of an OpenMP runtime; stops at one that comes with torch.
int note_runtime(dl_phdr_info* info, std::size_t, void* found) {
  const std::string path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
  const std::string name = path.substr(path.rfind('/') + 1);
  const auto starts = [&](const char* prefix) { return name.rfind(prefix, 0) == 0; };
  if (!starts("libgomp") && !starts("libiomp5") && !starts("libomp")) return 0;
  *static_cast<std::string*>(found) = path;
  return path.find("torch") != std::string::npos;
}

Team find_team() {
  std::string path;
  dl_iterate_phdr(note_runtime, &path);
  if (path.empty()) return nullptr;
  void* runtime = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return runtime == nullptr ? nullptr : reinterpret_cast<Team>(dlsym(runtime, "GOMP_parallel"));
}

}  // namespace

Team torch_team() {
  static const Team team = find_team();
  return team;
}
#else
Team torch_team() { return nullptr; }
#endif

}  // namespace airl_fast
