// cuBLAS and NCCL of the null GPU, as far as their calls return something; tests/helpers/null_gpu.py makes the others.
#include "null.h"

static int object(void** made) { *made = calloc(1, 512); return 0; }
X int cublasCreate_v2(void** h) { return object(h); }
X int cublasGetMathMode(void*, int* m) { *m = 0; return 0; }
X int cublasGetPointerMode_v2(void*, int* m) { *m = 0; return 0; }
X size_t cublasLtGetVersion() { return 130100; }
X int cublasLtMatmulDescCreate(void** d, int, int) { return object(d); }
X int cublasLtMatmulPreferenceCreate(void** d) { return object(d); }
X int cublasLtMatrixLayoutCreate(void** d, int, unsigned long long, unsigned long long, long long) { return object(d); }
struct Heuristic { unsigned long long algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };
X int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* r, int* found) {
  memset(r, 0, sizeof *r);
  *found = 1;
  return 0;
}

// One rank: a collective copies (up to 1 MiB). Widths by ncclDataType_t.
static int collective(const char* call, const void* from, void* to, size_t n, int type) {
  static const size_t width[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  count(call);
  if (from != to && n * width[type] <= SMALL) memmove(to, from, n * width[type]);
  return 0;
}
#define COLLECTIVE(name) \
  X int name(const void* s, void* r, size_t n, int t, ...) { return collective("N " #name, s, r, n, t); }
COLLECTIVE(ncclAllReduce) COLLECTIVE(ncclAllGather) COLLECTIVE(ncclBroadcast) COLLECTIVE(ncclReduceScatter)
COLLECTIVE(ncclReduce)
#define JOINED(name) X int name(void** c, ...) { count("N " #name); return object(c); }
JOINED(ncclCommInitRank) JOINED(ncclCommInitRankConfig) JOINED(ncclCommInitRankScalable)
X int ncclCommSplit(void*, int, int, void** c, void*) { count("N ncclCommSplit"); return object(c); }
X int ncclGetUniqueId(void* p) { memset(p, 1, 128); return 0; }
X int ncclCommGetAsyncError(void*, int* e) { *e = 0; return 0; }
X int ncclGetVersion(int* v) { *v = 23007; return 0; }
X const char* ncclGetErrorString(int) { return "null"; }
X const char* ncclGetLastError(void*) { return "null"; }
X int ncclCommCount(void*, int* n) { *n = 1; return 0; }
X int ncclCommUserRank(void*, int* n) { *n = 0; return 0; }
X int ncclMemAlloc(void** p, size_t n) { *p = malloc(n); return 0; }
X int ncclCommRegister(void*, void*, size_t, void** h) { return object(h); }
X int ncclCommWindowRegister(void*, void*, size_t, void** h, int) { return object(h); }
