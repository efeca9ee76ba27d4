"""Where servers are put to work: containers, clusters, and the clients that use them.

`__main__` is what the image's commands run. `boot` reads the variables, `container` does what they
ask for, `package` installs llama.cpp's programs, `health` answers the health check. `kubernetes/`
writes manifests, `claude` knows what Claude Code is told.
"""
