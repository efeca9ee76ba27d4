"""What users type, a file each, and what these share: request, programs, model, servers."""
