"""User-space device drivers over the `Backend` protocol: they run unchanged on the model and on a real kernel."""
