// Shared by the sources of the null GPU; README.md says what it is.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>

#define X extern "C" __attribute__((visibility("default")))
#define RUNTIME(name, arguments, ...) X cudaError_t name arguments { __VA_ARGS__; return cudaSuccess; }
#define DRIVER(name, arguments, ...) X CUresult name arguments { __VA_ARGS__; return CUDA_SUCCESS; }
// A function of this name that takes anything and succeeds (0), whatever a header says of its arguments.
#define NOTHING(name) X int null_##name(...) __asm__(#name); int null_##name(...) { return 0; }
// The same, which gives a value through its first argument.
#define RETURNS(name, type, value) \
  X int null_##name(type* v, ...) __asm__(#name); int null_##name(type* v, ...) { *v = value; return 0; }

static const char NAME[] = "NVIDIA H200 (null)";
static const size_t TOTAL = 151000000000ull;  // bytes of its memory
static const size_t SMALL = 1 << 20;          // bytes up to which copies and fills happen

void count(const std::string& call);
void wait(const char* call);
int attribute(int number);
int devices();
