// The CUDA driver of the null GPU: what torch, Inductor and Triton ask of libcuda.so.1.
#include "null.h"

DRIVER(cuDriverGetVersion, (int* v), *v = CUDA_VERSION)
DRIVER(cuDeviceGetCount, (int* n), *n = devices())
DRIVER(cuDeviceGet, (CUdevice* d, int i), *d = i)
DRIVER(cuDeviceGetName, (char* n, int l, CUdevice), snprintf(n, l, "%s", NAME))
DRIVER(cuDeviceGetAttribute, (int* v, CUdevice_attribute a, CUdevice), *v = attribute(a))
DRIVER(cuDevicePrimaryCtxGetState, (CUdevice, unsigned* f, int* a), *f = 0; *a = 1)
DRIVER(cuGetErrorString, (CUresult, const char** s), *s = "null")
DRIVER(cuGetErrorName, (CUresult, const char** s), *s = "null")
DRIVER(cuModuleGetFunction, (CUfunction* f, CUmodule, const char* name), *f = (CUfunction)strdup(name))
DRIVER(cuFuncGetAttribute, (int* v, CUfunction_attribute a, CUfunction),
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0)
DRIVER(cuPointerGetAttribute, (void* v, CUpointer_attribute a, CUdeviceptr p),
  if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)v = p; else *(int*)v = 0)
DRIVER(cuStreamSynchronize, (CUstream), wait("cuStreamSynchronize"))

static void launched(CUfunction f) { count(std::string("T ") + (const char*)f); }
DRIVER(cuLaunchKernel, (CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                        void**, void**), launched(f))
DRIVER(cuLaunchKernelEx, (const CUlaunchConfig*, CUfunction f, void**, void**), launched(f))
DRIVER(cuLaunchCooperativeKernel, (CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                   CUstream, void**), launched(f))

static const CUcontext CONTEXT = (CUcontext)16;
static const CUmodule MODULE = (CUmodule)16;
RETURNS(cuDevicePrimaryCtxRetain, CUcontext, CONTEXT) RETURNS(cuCtxGetCurrent, CUcontext, CONTEXT)
RETURNS(cuCtxGetDevice, CUdevice, 0) RETURNS(cuCtxGetLimit, size_t, 1 << 20)
RETURNS(cuModuleLoad, CUmodule, MODULE) RETURNS(cuModuleLoadData, CUmodule, MODULE)
RETURNS(cuModuleLoadDataEx, CUmodule, MODULE)
RETURNS(cuOccupancyMaxActiveBlocksPerMultiprocessor, int, 2) RETURNS(cuOccupancyMaxActiveClusters, int, 2)
RETURNS(cuMemGetAllocationGranularity, size_t, 2 << 20)
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuModuleUnload) NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig) NOTHING(cuLinkCreate_v2) NOTHING(cuLinkAddData_v2) NOTHING(cuLinkComplete)
NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuStreamGetCaptureInfo)
X int null_any(...) { return 0; }  // any other function of the driver (cudaGetDriverEntryPointByVersion)
