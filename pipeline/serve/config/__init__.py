"""Files that ask for servers: read, checked, and turned into instances."""
