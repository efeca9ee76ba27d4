"""From a reference to a GGUF: which files, converted how, quantized to what, how much memory."""
