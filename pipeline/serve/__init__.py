"""From a GGUF to a running server: its flags, its command line, its life in the foreground."""
