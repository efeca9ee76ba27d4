"""Where servers run when it is not this machine: Kubernetes."""
