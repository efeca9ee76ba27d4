"""The table of steps, the words of a command line, and all that bends doit."""
