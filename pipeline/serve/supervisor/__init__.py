"""Many servers under one supervisor: what is wanted is in one file, what is there in another."""
