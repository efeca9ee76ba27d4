"""What is measured of a model: its quality, its speed, and pictures of both."""
