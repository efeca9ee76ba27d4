"""The programs packed for other machines, and installed from such an archive."""
