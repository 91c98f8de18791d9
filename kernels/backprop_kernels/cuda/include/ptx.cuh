// The words that differ between NVRTC and the host compiler of the tests, and every PTX instruction.
// Each wrapper has a PTX body, which a GPU runs, and a plain C++ body, which the emulator runs.
#pragma once

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#else
#define DEVICE inline
#define DYNAMIC_SHARED(name) unsigned char* const name = host::dynamic_shared()
#endif
