"""One address for all servers of a configuration."""
