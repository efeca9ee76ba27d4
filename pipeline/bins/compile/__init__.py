"""llama.cpp compiled on this machine: its source, its web page, CUDA's compiler, CMake."""
