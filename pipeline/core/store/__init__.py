"""What is kept on disk: published whole, described by receipts, made by one process at a time."""
