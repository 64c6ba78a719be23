// Which plugin interface the TensorRT at hand wants; the only file with a version in an #if.
#pragma once

#include <NvInferVersion.h>

#if !defined(TRT_MAJOR_RTX) && NV_TENSORRT_MAJOR < 10
#define TRT_GRAFT_PLUGIN_V2 1
#else
#define TRT_GRAFT_PLUGIN_V2 0
#endif
