"""The programs that llama.cpp's own project publishes."""
