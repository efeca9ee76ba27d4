"""Many servers, kept by one supervisor: what is wanted stands in one file, what is there in another."""
