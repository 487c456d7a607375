// A plug-in of another build, for plugin_test.cc.
#include "kernels/cuda_plugin.h"

extern "C" const kvshare::kernels::CudaPluginApi* KvshareCudaPlugin() {
  static const kvshare::kernels::CudaPluginApi api = {.abi = 999};
  return &api;
}
