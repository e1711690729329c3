// The CUDA runtime of a GPU that does nothing: calls succeed and are counted by name, kernels are not run, device memory
// is reserved host memory, copies and fills of up to 1 MiB do happen (so scalars that come from the host are right).
//
// What is counted: "K name" a kernel of a library, "T name" one of Triton (driver.cpp), "N name" NCCL (libraries.cpp),
// "SYNC call" a wait of the host, "G graph of n" a replay; copies by the kinds of their ends; other calls by their names.
// Within a capture, launches are counted as the graph's nodes and not otherwise.
#include "null.h"
#include <sys/mman.h>
#include <map>
#include <mutex>
#include <unordered_map>

using Lock = std::lock_guard<std::mutex>;
struct Block { size_t size; int kind; };
static std::mutex mutex;
static const int PINNED = 1, DEVICE = 2;
static const cudaStream_t NO_STREAM = (cudaStream_t)-1;
static size_t used = 0;
static cudaStream_t capturing = NO_STREAM;
static long captured = 0, capture_id = 0;
static thread_local int current = 0;
static void (*on_wait)(const char*) = nullptr;
// Never destroyed: libraries call in while the process ends.
static auto& blocks = *new std::map<char*, Block>;
static auto& counts = *new std::map<std::string, long>;
static auto& graphs = *new std::map<size_t, long>;
static std::string& text = *new std::string;
// Libraries register their kernels in their constructors, maybe before this file's.
static auto& names() { static auto* map = new std::unordered_map<const void*, std::string>; return *map; }

// ---- What card.py asks ----
X void null_reset() { Lock lock(mutex); counts.clear(); }
X void null_on_wait(void (*function)(const char*)) { on_wait = function; }  // called at every wait of the host
X const char* null_counts() {  // lines "number<tab>call"; valid until the next call
  Lock lock(mutex);
  text.clear();
  for (auto& each : counts) text += std::to_string(each.second) + "\t" + each.first + "\n";
  return text.c_str();
}

void count(const std::string& call) {
  Lock lock(mutex);
  if (capturing != NO_STREAM && call[1] == ' ') captured++;
  else counts[call]++;
}
void wait(const char* call) { count(std::string("SYNC ") + call); if (on_wait) on_wait(call); }

// ---- The card ----
int attribute(int number) {  // cudaDeviceAttr and CUdevice_attribute have the same numbers
  static const std::map<int, int> values = {
    {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {9, 65536}, {10, 32},
    {12, 65536}, {13, 1980000}, {16, 132}, {36, 3201000}, {37, 6144}, {38, 62914560}, {39, 2048}, {41, 1}, {75, 9},
    {76, 0}, {81, 233472}, {82, 65536}, {95, 1}, {97, 232448}, {106, 32}, {111, 1024}};
  auto found = values.find(number);
  return found == values.end() ? 0 : found->second;
}
int devices() { const char* s = getenv("NULLGPU_DEVICES"); return s ? atoi(s) : 1; }
RUNTIME(cudaGetDeviceCount, (int* n), *n = devices())
RUNTIME(cudaGetDevice, (int* d), *d = current)
RUNTIME(cudaSetDevice, (int d), current = d)
RUNTIME(cudaDeviceGetAttribute, (int* v, cudaDeviceAttr a, int), *v = attribute(a))
RUNTIME(cudaGetDeviceProperties, (cudaDeviceProp* p, int),
  memset(p, 0, sizeof *p);
  strcpy(p->name, NAME);
  p->major = 9; p->minor = 0; p->totalGlobalMem = TOTAL; p->multiProcessorCount = 132; p->warpSize = 32;
  p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = 232448; p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = 65536; p->regsPerMultiprocessor = 65536; p->totalConstMem = 65536; p->l2CacheSize = 62914560;
  p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048; p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = 1024; p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = 65535; p->maxGridSize[2] = 65535;
  p->textureAlignment = 512; p->canMapHostMemory = 1; p->concurrentKernels = 1; p->asyncEngineCount = 3;
  p->unifiedAddressing = 1; p->memoryBusWidth = 6144; p->cooperativeLaunch = 1)
RUNTIME(cudaDeviceGetStreamPriorityRange, (int* l, int* g), *l = 0; *g = -5)
RUNTIME(cudaDeviceCanAccessPeer, (int* y, int, int), *y = 1)
RUNTIME(cudaDeviceGetPCIBusId, (char* b, int n, int d), snprintf(b, n, "0000:%02x:00.0", d + 1))
RUNTIME(cudaDriverGetVersion, (int* v), *v = CUDART_VERSION)
RUNTIME(cudaRuntimeGetVersion, (int* v), *v = CUDART_VERSION)
NOTHING(cudaDeviceEnablePeerAccess) NOTHING(cudaGetLastError) NOTHING(cudaPeekAtLastError)
NOTHING(cudaProfilerStart) NOTHING(cudaProfilerStop)

// ---- Memory ----
static cudaError_t grab(void** p, size_t size, int kind) {
  size_t n = size ? (size + 4095) & ~4095ull : 4096;
  Lock lock(mutex);
  *p = nullptr;
  if (kind == DEVICE && used + n > TOTAL) return cudaErrorMemoryAllocation;
  void* got = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return cudaErrorMemoryAllocation;
  if (kind == DEVICE) used += n;
  blocks[(char*)got] = {n, kind};
  *p = got;
  return cudaSuccess;
}
static void drop(void* p) {
  Lock lock(mutex);
  auto it = blocks.find((char*)p);
  if (it == blocks.end()) return;
  if (it->second.kind == DEVICE) used -= it->second.size;
  munmap(p, it->second.size);
  blocks.erase(it);
}
static int kind_of(const void* p) {
  Lock lock(mutex);
  auto it = blocks.upper_bound((char*)p);
  if (it == blocks.begin()) return 0;
  --it;
  return (char*)p < it->first + it->second.size ? it->second.kind : 0;
}
static void move(void* d, const void* s, size_t n, const char* call) {
  static const char* kinds[] = {"pageable", "pinned", "device"};
  count(std::string(call) + " " + kinds[kind_of(s)] + ">" + kinds[kind_of(d)]);
  if (n <= SMALL) memmove(d, s, n);
}
static void fill(void* d, int v, size_t n) { count("cudaMemset"); if (n <= SMALL) memset(d, v, n); }
X cudaError_t cudaMalloc(void** p, size_t n) { count("cudaMalloc"); return grab(p, n, DEVICE); }
X cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
X cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { count("cudaHostAlloc"); return grab(p, n, PINNED); }
X cudaError_t cudaMallocHost(void** p, size_t n) { return cudaHostAlloc(p, n, 0); }
X cudaError_t cudaGetSymbolAddress(void** p, const void*) { return grab(p, SMALL, DEVICE); }
RUNTIME(cudaFree, (void* p), count("cudaFree"); drop(p))
RUNTIME(cudaFreeAsync, (void* p, cudaStream_t), cudaFree(p))
RUNTIME(cudaFreeHost, (void* p), count("cudaFreeHost"); drop(p))
RUNTIME(cudaHostRegister, (void*, size_t, unsigned), count("cudaHostRegister"))
RUNTIME(cudaHostGetDevicePointer, (void** d, void* h, unsigned), *d = h)
RUNTIME(cudaMemGetInfo, (size_t* f, size_t* t), *f = TOTAL - used; *t = TOTAL)
RUNTIME(cudaMemcpy, (void* d, const void* s, size_t n, cudaMemcpyKind), move(d, s, n, "cudaMemcpy"))
RUNTIME(cudaMemcpyAsync, (void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t),
  move(d, s, n, "cudaMemcpyAsync"))
RUNTIME(cudaMemcpyPeerAsync, (void* d, int, const void* s, int, size_t n, cudaStream_t),
  move(d, s, n, "cudaMemcpyPeerAsync"))
RUNTIME(cudaMemset, (void* d, int v, size_t n), fill(d, v, n))
RUNTIME(cudaMemsetAsync, (void* d, int v, size_t n, cudaStream_t), fill(d, v, n))
RUNTIME(cudaPointerGetAttributes, (cudaPointerAttributes* a, const void* p),
  memset(a, 0, sizeof *a);
  int kind = kind_of(p);
  a->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->devicePointer = a->hostPointer = (void*)p)
RUNTIME(cudaDeviceGetDefaultMemPool, (cudaMemPool_t* p, int), *p = (cudaMemPool_t)16)
RUNTIME(cudaMemPoolGetAttribute, (cudaMemPool_t, cudaMemPoolAttr, void* v), *(size_t*)v = 0)
NOTHING(cudaHostUnregister) NOTHING(cudaMemcpyToSymbol) NOTHING(cudaMemPoolSetAttribute)
NOTHING(cudaMemPoolSetAccess) NOTHING(cudaMemPoolTrimTo)

// ---- Kernels ----
X void __cudaRegisterFunction(
    void** h, const char* f, char* df, const char* name, int l, void* a, void* b, void* c, void* d, int* e) {
  { Lock lock(mutex); names()[f] = name; }
  static auto real = (decltype(&__cudaRegisterFunction))dlsym(RTLD_NEXT, "__cudaRegisterFunction");
  real(h, f, df, name, l, a, b, c, d, e);
}
static void launched(const void* f) {
  std::string name = "?";
  { Lock lock(mutex); auto it = names().find(f); if (it != names().end()) name = it->second; }
  count("K " + name);
}
RUNTIME(cudaLaunchKernel, (const void* f, dim3, dim3, void**, size_t, cudaStream_t), launched(f))
RUNTIME(cudaLaunchKernelExC, (const cudaLaunchConfig_t*, const void* f, void**), launched(f))
RUNTIME(__cudaLaunchKernel, (cudaKernel_t k, dim3, dim3, void**, size_t, cudaStream_t), launched((const void*)k))
RUNTIME(__cudaGetKernel, (cudaKernel_t* k, const void* f), *k = (cudaKernel_t)f)
RUNTIME(cudaFuncGetAttributes, (cudaFuncAttributes* a, const void*),
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024; a->numRegs = 64; a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448)
RETURNS(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int, 2)
RETURNS(cudaLibraryLoadData, cudaLibrary_t, (cudaLibrary_t)16)
RUNTIME(cudaLibraryGetKernel, (cudaKernel_t* k, cudaLibrary_t, const char* name),
  *k = (cudaKernel_t)strdup(name); Lock lock(mutex); names()[*k] = name)
RUNTIME(cudaGetDriverEntryPointByVersion,
  (const char* name, void** p, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* r),
  *p = dlsym(RTLD_DEFAULT, name);
  if (!*p) *p = dlsym(RTLD_DEFAULT, "null_any");
  if (r) *r = cudaDriverEntryPointSuccess)
NOTHING(cudaFuncSetAttribute) NOTHING(cudaLibraryUnload) NOTHING(cudaKernelSetAttributeForDevice)

// ---- Streams and events ----
static size_t handle() { static size_t n = 0x1000; Lock lock(mutex); return n += 16; }
RUNTIME(cudaStreamCreate, (cudaStream_t* s), *s = (cudaStream_t)handle())
RUNTIME(cudaStreamCreateWithFlags, (cudaStream_t* s, unsigned), cudaStreamCreate(s))
RUNTIME(cudaStreamCreateWithPriority, (cudaStream_t* s, unsigned, int), cudaStreamCreate(s))
RUNTIME(cudaStreamGetPriority, (cudaStream_t, int* p), *p = 0)
RUNTIME(cudaStreamWaitEvent, (cudaStream_t, cudaEvent_t, unsigned), count("cudaStreamWaitEvent"))
RUNTIME(cudaLaunchHostFunc, (cudaStream_t, cudaHostFn_t f, void* d), f(d))
RUNTIME(cudaStreamAddCallback, (cudaStream_t s, cudaStreamCallback_t f, void* d, unsigned), f(s, cudaSuccess, d))
RUNTIME(cudaEventCreate, (cudaEvent_t* e), count("cudaEventCreate"); *e = (cudaEvent_t)handle())
RUNTIME(cudaEventCreateWithFlags, (cudaEvent_t* e, unsigned), cudaEventCreate(e))
RUNTIME(cudaEventRecord, (cudaEvent_t, cudaStream_t), count("cudaEventRecord"))
RUNTIME(cudaEventRecordWithFlags, (cudaEvent_t e, cudaStream_t s, unsigned), cudaEventRecord(e, s))
RUNTIME(cudaEventElapsedTime, (float* ms, cudaEvent_t, cudaEvent_t), *ms = 0.1f)
RUNTIME(cudaStreamSynchronize, (cudaStream_t), wait("cudaStreamSynchronize"))
RUNTIME(cudaEventSynchronize, (cudaEvent_t), wait("cudaEventSynchronize"))
RUNTIME(cudaDeviceSynchronize, (), wait("cudaDeviceSynchronize"))
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamQuery) NOTHING(cudaEventDestroy) NOTHING(cudaEventQuery)

// ---- Graphs ----
static cudaStreamCaptureStatus status(cudaStream_t s) {
  return s == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
static cudaGraph_t graph() { return (cudaGraph_t)(capture_id * 16); }
RUNTIME(cudaStreamIsCapturing, (cudaStream_t t, cudaStreamCaptureStatus* s), *s = status(t))
RUNTIME(cudaStreamGetCaptureInfo, (cudaStream_t t, cudaStreamCaptureStatus* s, unsigned long long* id, cudaGraph_t* g,
                                   const cudaGraphNode_t** d, const cudaGraphEdgeData** e, size_t* n),
  *s = status(t);
  if (id) *id = t == capturing ? capture_id : 0;
  if (g) *g = graph();
  if (n) *n = 0;
  if (d) *d = nullptr;
  if (e) *e = nullptr)
RUNTIME(cudaStreamBeginCapture, (cudaStream_t t, cudaStreamCaptureMode), capturing = t; captured = 0; capture_id++)
RUNTIME(cudaStreamBeginCaptureToGraph, (cudaStream_t t, cudaGraph_t, const cudaGraphNode_t*, const cudaGraphEdgeData*,
                                        size_t, cudaStreamCaptureMode m), cudaStreamBeginCapture(t, m))
RUNTIME(cudaStreamEndCapture, (cudaStream_t, cudaGraph_t* g),
  capturing = NO_STREAM; *g = graph(); graphs[(size_t)*g] = captured)
RUNTIME(cudaGraphInstantiate, (cudaGraphExec_t* x, cudaGraph_t g, unsigned long long), *x = (cudaGraphExec_t)g)
RUNTIME(cudaGraphInstantiateWithFlags, (cudaGraphExec_t* x, cudaGraph_t g, unsigned long long f),
  cudaGraphInstantiate(x, g, f))
RUNTIME(cudaGraphLaunch, (cudaGraphExec_t x, cudaStream_t), count("G graph of " + std::to_string(graphs[(size_t)x])))
RUNTIME(cudaGraphGetNodes, (cudaGraph_t g, cudaGraphNode_t* a, size_t* n),
  if (!a) *n = graphs.count((size_t)g) ? graphs[(size_t)g] : captured)
RUNTIME(cudaGraphNodeGetDependencies, (cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* n), *n = 0)
RETURNS(cudaUserObjectCreate, cudaUserObject_t, (cudaUserObject_t)16)
NOTHING(cudaGraphUpload) NOTHING(cudaGraphExecDestroy) NOTHING(cudaGraphDestroy) NOTHING(cudaUserObjectRelease)
NOTHING(cudaGraphRetainUserObject) NOTHING(cudaStreamUpdateCaptureDependencies)
NOTHING(cudaThreadExchangeStreamCaptureMode)
