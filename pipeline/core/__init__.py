"""What every step needs and no step owns. Nothing here knows what a model is."""
