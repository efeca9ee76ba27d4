"""llama.cpp itself: its source, this host, the backends, and the build into `bins/`."""
