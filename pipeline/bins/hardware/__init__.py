"""What this machine has, and which backend it can run."""
